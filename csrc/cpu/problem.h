// The sizes and scalars of one call, and the layout that all files share.
//
// Arrays with a value per class are stored as (D, classes), the classes padded with zeros to a multiple of 16. In this
// layout the left factor of every product is already in place, and a sum over the features of a class adds vectors
// instead of the elements of one vector.
#pragma once

#include <algorithm>
#include <cstdint>

#include "adapter_loops.h"
#include "scratch.h"

namespace rada_fast {

// The number of queries of one kind per tile, and of keys per tile. The backward pass has three tiles of 256 x 128 or
// 256 x 256 floats, which fill half of a 1 MB second-level cache.
constexpr int64_t kQueryBlock = 128;
constexpr int64_t kKeyBlock = 256;
// The number of classes per tile of the projections and of the output, and of features per product within a tile.
constexpr int64_t kClassTile = 256;
constexpr int64_t kFeatureBlock = 64;
// Limits of the attention with merged query kinds. A block of queries then has at most 1.1 MB of scores or exponentials with
// all keys. With the row softmax, heads narrower than this would spend more time on passes over them than the saved product
// takes.
constexpr int64_t kMergedClasses = 1024;
constexpr int64_t kMergedHeadWidth = 128;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Rounds up to an even number for bfloat16, whose products need an even inner dimension. The added row is zero in one
// factor and finite in the other. even<T>(1) is the number of elements that a column has in each row of an operand.
template <typename T>
constexpr int64_t even(int64_t n) {
  return sizeof(T) == 2 ? round_up(n, 2) : n;
}

struct Problem {
  int64_t batch, classes, width, heads, head_width;
  int64_t padded;        // classes rounded up to 16: the leading dimension
  int64_t query_blocks;  // per head
  bool image, text, rational;
  bool matrix_softmax, relu;
  bool merged;  // whether the kinds with a query per class share one product with the values, see class_attention.h
  Penalty penalty;
  double score_scale;     // 1 / (sqrt(d) temperature)
  double logit_scale;     // s
  double query_scale;     // the factor of the image and text queries' inputs
  double rational_scale;  // the factor of R in the projections
  int threads;

  int64_t kinds() const { return int64_t(image) + int64_t(text) + int64_t(rational); }
  int64_t per_class_kinds() const { return int64_t(text) + int64_t(rational); }  // kinds with one query per class
  int64_t attended_kinds() const { return merged ? 1 : per_class_kinds(); }  // results that are stored on their own
  int64_t image_size() const { return width * padded; }
  // Whether the forward pass keeps A for the backward pass. To compute it again saves memory, and with very many classes it
  // takes little of the time.
  bool keeps_offset() const { return classes <= 2 * width; }
};

}  // namespace rada_fast
