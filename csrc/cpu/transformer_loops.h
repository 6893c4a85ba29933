// The vector loops of an image encoder around its matrix products. See instruction_set.h.
//
// Arrays are row-major; `ld` is the distance between rows in elements.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace rada_fast {

enum class Activation : int { gelu, silu };

struct TransformerLoops {
  // Writes each patch of an image (channels, height, width) to one row of out, whose width is channels * high * wide.
  void (*patches)(const float* image, int64_t channels, int64_t height, int64_t width, int64_t high, int64_t wide,
                  float* out);
  // out = (row - mean) / sqrt(variance + eps) * weight + bias for each row, which may be out itself. If `added` is not
  // null, it is added to the row afterwards.
  void (*normalise)(float* rows, int64_t count, int64_t width, const float* weight, const float* bias, float eps,
                    const float* added, float* out);
  // Writes a row of `columns` values `count` times.
  void (*repeat)(const float* row, int64_t columns, int64_t count, float* out, int64_t ld);
  // GELU is x Phi(x), SiLU x / (1 + e^-x); in place.
  void (*activate)(Activation activation, float* values, int64_t ld, int64_t rows, int64_t columns);
  // scores = e^(scale (score - the maximum of its row)), and total receives the sum of each row. Columns from `columns`
  // to `padded` become zeros.
  void (*exponentials)(float* scores, int64_t ld, int64_t rows, int64_t columns, int64_t padded, float scale,
                       float* total);
  // Divides each row by its total.
  void (*divide)(float* values, int64_t ld, int64_t rows, int64_t columns, const float* total);
};

RADA_LOOPS(TransformerLoops)

}  // namespace rada_fast
