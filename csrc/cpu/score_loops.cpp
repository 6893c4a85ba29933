#include "score_loops.h"

#include <cmath>
#include <cstring>

#include "bfloat16_pairs.h"
#include "vector_scalars.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

// Columns are handled in strips, whose maxima and sums stay in registers while the loop goes over the rows. Two vectors
// of float fill a strip with AVX-512.
constexpr int64_t kStrip = 32;

// Returns the columns of a strip: `fixed`, which the compiler knows, or `rest` where fixed is 0.
template <int64_t fixed>
constexpr int64_t width_of(int64_t rest) {
  return fixed ? fixed : rest;
}

// Returns the factor c for which 2^(c x) is e^(scale x). The power of two takes fewer operations than that of e.
template <typename A>
inline A binary(A scale) {
  return static_cast<A>(1.4426950408889634 * static_cast<double>(scale));
}

template <typename T, typename A>
inline A as_stored(A x) {
  if constexpr (sizeof(T) != 2) {
    return x;
  } else {
    const uint32_t bits = rounded(x) & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
}

template <typename A>
void column_maximum(const A* scores, int64_t ld, int64_t rows, int64_t columns, A* running_max) {
  constexpr int64_t strip = 64;
  for (int64_t c0 = 0; c0 < columns; c0 += strip) {
    const int64_t width = columns - c0 < strip ? columns - c0 : strip;
    A best[strip];
    for (int64_t c = 0; c < strip; ++c) best[c] = -HUGE_VAL;
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = scores + r * ld + c0;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) best[c] = best[c] < row[c] ? row[c] : best[c];
    }
    for (int64_t c = 0; c < width; ++c)
      running_max[c0 + c] = running_max[c0 + c] < best[c] ? best[c] : running_max[c0 + c];
  }
}

template <int64_t fixed, typename T, typename A>
void exponentials_of_strip(A* scores, int64_t ld, int64_t rows, int64_t rest, A scale, const A* maximum, A* sum,
                           A* stored_sum, T* operand) {
  const int64_t width = width_of<fixed>(rest);
  const A factor = binary(scale);
  A most[kStrip], total[kStrip], stored_total[kStrip];
  for (int64_t c = 0; c < width; ++c) {
    most[c] = maximum[c];
    total[c] = sum[c];
    if constexpr (sizeof(T) == 2) stored_total[c] = stored_sum[c];
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* row = scores + r * ld;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      const A p = power_of_two(factor * (row[c] - most[c]));
      total[c] += p;
      row[c] = as_stored<T>(p);
      if constexpr (sizeof(T) == 2) stored_total[c] += row[c];
    }
    if constexpr (sizeof(T) == 2) {
      const bool last = r + 1 == rows;
      if (r % 2 == 1)
        pack_pair(row - ld, row, A(1), A(1), static_cast<const A*>(nullptr), width, operand + (r - 1) * ld);
      else if (last)
        pack_pair(row, row, A(1), A(0), static_cast<const A*>(nullptr), width, operand + r * ld);
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    sum[c] = total[c];
    if constexpr (sizeof(T) == 2) stored_sum[c] = stored_total[c];
  }
}

template <typename T, typename A>
void exponentials(A* scores, int64_t ld, int64_t rows, int64_t columns, A scale, const A* maximum, A* sum,
                  A* stored_sum, T* operand) {
  int64_t c = 0;
  // In an operand of interleaved pairs each column has two elements.
  constexpr int64_t step = sizeof(T) == 2 ? 2 : 1;
  for (; c + kStrip <= columns; c += kStrip)
    exponentials_of_strip<kStrip, T>(scores + c, ld, rows, kStrip, scale, maximum + c, sum + c, stored_sum + c,
                                     operand + c * step);
  if (c < columns)
    exponentials_of_strip<0, T>(scores + c, ld, rows, columns - c, scale, maximum + c, sum + c, stored_sum + c,
                                operand + c * step);
}

template <int64_t fixed, bool first, typename A>
void score_gradients_of_strip(A* scores, int64_t ld, const A* dprobabilities, A* total, int64_t ldp, int64_t rows,
                              int64_t rest, A scale, const A* maximum, const A* weight, const A* delta) {
  const int64_t width = width_of<fixed>(rest);
  const A exponent = binary(scale);
  A most[kStrip], factor[kStrip], mean[kStrip];
  for (int64_t c = 0; c < width; ++c) {
    most[c] = maximum[c];
    factor[c] = weight[c];
    mean[c] = delta[c];
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* row = scores + r * ld;
    const A* dp = dprobabilities + r * ldp;
    A* all = total + r * ldp;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      const A p = factor[c] * power_of_two(exponent * (row[c] - most[c]));
      row[c] = scale * p * (dp[c] - mean[c]);
      all[c] = first ? p : all[c] + p;
    }
  }
}

template <bool first, typename A>
void score_gradients_of(A* scores, int64_t ld, const A* dprobabilities, A* total, int64_t ldp, int64_t rows,
                        int64_t columns, A scale, const A* maximum, const A* weight, const A* delta) {
  int64_t c = 0;
  for (; c + kStrip <= columns; c += kStrip)
    score_gradients_of_strip<kStrip, first>(scores + c, ld, dprobabilities + c, total + c, ldp, rows, kStrip, scale,
                                            maximum + c, weight + c, delta + c);
  if (c < columns)
    score_gradients_of_strip<0, first>(scores + c, ld, dprobabilities + c, total + c, ldp, rows, columns - c, scale,
                                       maximum + c, weight + c, delta + c);
}

template <typename A>
void score_gradients(A* scores, int64_t ld, const A* dprobabilities, A* total, int64_t ldp, int64_t rows,
                     int64_t columns, A scale, const A* maximum, const A* weight, const A* delta, bool first) {
  if (first)
    score_gradients_of<true>(scores, ld, dprobabilities, total, ldp, rows, columns, scale, maximum, weight, delta);
  else
    score_gradients_of<false>(scores, ld, dprobabilities, total, ldp, rows, columns, scale, maximum, weight, delta);
}

template <typename A>
void weighted_sum(const A* first, const A* second, int64_t ld, A first_factor, A second_factor, int64_t rows,
                  int64_t columns, A* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    const A *x = first + r * ld, *y = second + r * ld;
    A* to = out + r * ldo;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] = first_factor * x[c] + second_factor * y[c];
  }
}

template <typename A>
void softmax(A* scores, int64_t count, A scale) {
  A best = -HUGE_VAL;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) best = best < scores[i] ? scores[i] : best;
  const A factor = binary(scale);
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = power_of_two(factor * (scores[i] - best));
    sum += scores[i];
  }
  const A inverse = A(1) / sum;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) scores[i] *= inverse;
}

template <typename A>
void rescales(const A* before, const A* after, A scale, int64_t count, A* out) {
  const A factor = binary(scale);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = power_of_two(factor * (before[i] - after[i]));
}

template <typename T>
const ScoreLoops<T>& table() {
  using A = Acc<T>;
  using F = Factor<T>;
  static const ScoreLoops<T> loops{column_maximum<A>, exponentials<F, A>, score_gradients<A>,
                                   weighted_sum<A>,   softmax<A>,         rescales<A>};
  return loops;
}

}  // namespace

#define RADA_DEFINE(T)              \
  template <>                       \
  const ScoreLoops<T>& loops() {    \
    return table<T>();              \
  }
RADA_STORED_TYPES(RADA_DEFINE)
#undef RADA_DEFINE

}  // namespace rada_fast::RADA_CAPABILITY
