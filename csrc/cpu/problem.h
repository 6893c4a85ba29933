// Sizes and scalars of one call, and the layout every kernel shares.
//
// Everything per class is stored feature-major, class-minor: (D, classes), the classes padded to a multiple of 16 with
// zeros. In this layout every product below finds its left factor in place, and sums over the features of a class are
// vertical, not across a vector.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "vector_math.h"

namespace rada_fast {

// Queries of one kind per tile, and keys per tile: the backward's three tiles of 256 x 128 or 256 x 256 floats fill half
// of a 1 MB second-level cache.
constexpr int64_t kQueryBlock = 128;
constexpr int64_t kKeyBlock = 256;
// Classes per tile of the projections and of the output, and features per product inside.
constexpr int64_t kClassTile = 256;
constexpr int64_t kFeatureBlock = 64;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Problem {
  int64_t batch, classes, width, heads, head_width;
  int64_t padded;        // classes rounded up to 16: the leading dimension
  int64_t query_blocks;  // per head
  bool image, text, rational;
  bool matrix_softmax, relu;
  Penalty penalty;
  double score_scale;     // 1 / (sqrt(d) temperature)
  double logit_scale;     // s
  double query_scale;     // of the image and text queries' inputs
  double rational_scale;  // of R where it enters the projections
  int threads;

  int64_t kinds() const { return int64_t(image) + int64_t(text) + int64_t(rational); }
  int64_t wide_kinds() const { return int64_t(text) + int64_t(rational); }  // those with one query per class
  int64_t image_size() const { return width * padded; }
};

// A thread's own memory, kept between calls: fresh pages cost more than the work on them at small sizes.
class Scratch {
 public:
  // The calling thread's memory, all of it free again.
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

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), 64);
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

  void grow(int64_t bytes) {
    const int64_t size = round_up(std::max<int64_t>(bytes, 1 << 20), 4096);
    Block block{std::unique_ptr<char, Free>(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size)))), size};
    if (!block.memory) throw std::bad_alloc();
    blocks_.push_back(std::move(block));
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0;
};

}  // namespace rada_fast
