// Rows of an operand of bfloat16, which are interleaved in pairs (adapter_loops.h). Only *_loops.cpp include this file.
// Everything here has internal linkage, for the reason that instruction_set.h gives.
#pragma once

#include "vector_scalars.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

template <typename T, typename A>
void pack_pair(const A* even, const A* odd, A even_scale, A odd_scale, const A* column_scale, int64_t columns, T* out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  if (column_scale) {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c)
      pairs[c] = (rounded(even[c] * even_scale * column_scale[c]) >> 16) |
                 (rounded(odd[c] * odd_scale * column_scale[c]) & 0xffff0000u);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c)
      pairs[c] = (rounded(even[c] * even_scale) >> 16) | (rounded(odd[c] * odd_scale) & 0xffff0000u);
  }
}

}  // namespace
}  // namespace rada_fast::RADA_CAPABILITY
