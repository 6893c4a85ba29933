// A thread's scratch memory, which is kept between calls: at small sizes, new pages would take more time than the work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace rada_fast {

class Scratch {
 public:
  // Returns the calling thread's memory with all of it free again: arrays taken from it before must no longer be used.
  static Scratch& rewound() {
    thread_local Scratch scratch;
    if (scratch.blocks_.size() > 1) {
      int64_t total = 0;
      for (const Block& block : scratch.blocks_) total += block.size;
      scratch.blocks_.clear();
      scratch.grow(total);
    }
    scratch.used_ = 0;
    return scratch;
  }

  // Returns uninitialised memory for `count` values, aligned to 64 bytes.
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
      grow(bytes);
      used_ = 0;
    }
    char* start = blocks_.back().memory.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(start);
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<char, Free> memory;
    int64_t size;
  };

  static int64_t rounded_up(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

  void grow(int64_t bytes) {
    const int64_t size = rounded_up(std::max<int64_t>(bytes, 1 << 20), 4096);
    Block block{std::unique_ptr<char, Free>(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size)))), size};
    if (!block.memory) throw std::bad_alloc();
    blocks_.push_back(std::move(block));
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;
};

}  // namespace rada_fast
