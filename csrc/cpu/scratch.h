// A thread's scratch memory, which is kept between calls: at small sizes, new pages would take more time than the work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace rada_fast {

// In a build with the address sanitizer, memory that belongs to no array must not be touched, and a gap follows each
// array. An access past its end is then reported, where it would otherwise reach the next array.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kScratchGap = 64;
inline void forbid_access(const void* start, int64_t bytes) { __asan_poison_memory_region(start, bytes); }
inline void allow_access(const void* start, int64_t bytes) { __asan_unpoison_memory_region(start, bytes); }
#else
constexpr int64_t kScratchGap = 0;
inline void forbid_access(const void*, int64_t) {}
inline void allow_access(const void*, int64_t) {}
#endif

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
    for (const Block& block : scratch.blocks_) forbid_access(block.memory.get(), block.size);
    scratch.used_ = 0;
    return scratch;
  }

  // Returns uninitialised memory for `count` values, aligned to 64 bytes.
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = rounded_up(count * static_cast<int64_t>(sizeof(T)), 64) + kScratchGap;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
      grow(bytes);
      used_ = 0;
    }
    char* start = blocks_.back().memory.get() + used_;
    used_ += bytes;
    allow_access(start, count * static_cast<int64_t>(sizeof(T)));
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
    forbid_access(block.memory.get(), block.size);
    blocks_.push_back(std::move(block));
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;
};

}  // namespace rada_fast
