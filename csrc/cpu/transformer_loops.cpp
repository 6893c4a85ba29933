#include "transformer_loops.h"

#include <cmath>
#include <cstring>

#include "vector_scalars.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

void patches(const float* image, int64_t channels, int64_t height, int64_t width, int64_t high, int64_t wide,
             float* out) {
  for (int64_t top = 0; top + high <= height; top += high)
    for (int64_t left = 0; left + wide <= width; left += wide)
      for (int64_t channel = 0; channel < channels; ++channel)
        for (int64_t y = 0; y < high; ++y, out += wide) {
          const float* from = image + (channel * height + top + y) * width + left;
#pragma omp simd
          for (int64_t x = 0; x < wide; ++x) out[x] = from[x];
        }
}

void normalise(float* rows, int64_t count, int64_t width, const float* weight, const float* bias, float eps,
               const float* added, float* out) {
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * width;
    float* to = out + r * width;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; ++c) total += row[c];
    const float mean = total * share;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < width; ++c) squares += (row[c] - mean) * (row[c] - mean);
    const float factor = 1.0f / std::sqrt(squares * share + eps);
    if (added) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const float x = row[c];
        to[c] = (x - mean) * factor * weight[c] + bias[c];
        row[c] = x + added[c];
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) to[c] = (row[c] - mean) * factor * weight[c] + bias[c];
    }
  }
}

void repeat(const float* row, int64_t columns, int64_t count, float* out, int64_t ld) {
  for (int64_t r = 0; r < count; ++r) {
    float* to = out + r * ld;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] = row[c];
  }
}

// erf by a quotient of polynomials with an absolute error below 2e-7; beyond 4 it is 1 in float.
inline float error_function(float x) {
  const float clamped = x < -4.0f ? -4.0f : (x > 4.0f ? 4.0f : x);
  const float square = clamped * clamped;
  float above = -2.72614225801306e-10f;
  above = above * square + 2.77068142495902e-08f;
  above = above * square - 2.10102402082508e-06f;
  above = above * square - 5.69250639462346e-05f;
  above = above * square - 7.34990630326855e-04f;
  above = above * square - 2.95459980854025e-03f;
  above = above * square - 1.60960333262415e-02f;
  float below = -1.45660718464996e-05f;
  below = below * square - 2.13374055278905e-04f;
  below = below * square - 1.68282697438203e-03f;
  below = below * square - 7.37332916720468e-03f;
  below = below * square - 1.42647390514189e-02f;
  return clamped * above / below;
}

inline float gelu(float x) {
  const float half = 0.5f * x;
  return half + half * error_function(x * 0.70710678f);
}

inline float silu(float x) {
  const float power = exponential_of(x < 0 ? x : -x);  // at most 1
  return x * (x < 0 ? power : 1.0f) / (1.0f + power);
}

void activate(Activation activation, float* values, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = values + r * ld;
    if (activation == Activation::gelu) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) row[c] = gelu(row[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) row[c] = silu(row[c]);
    }
  }
}

void exponentials(float* scores, int64_t ld, int64_t rows, int64_t columns, int64_t padded, float scale,
                  float* total) {
  // The maxima of all rows come first: a row's exponentials then need not wait for its own maximum.
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    for (int64_t c = columns; c < padded; ++c) row[c] = -HUGE_VALF;
    float best = -HUGE_VALF;
#pragma omp simd reduction(max : best)
    for (int64_t c = 0; c < padded; ++c) best = best < row[c] ? row[c] : best;
    total[r] = best;
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    const float best = total[r];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < padded; ++c) {
      row[c] = exponential_of(scale * (row[c] - best));
      sum += row[c];
    }
    total[r] = sum;
  }
}

void divide(float* values, int64_t ld, int64_t rows, int64_t columns, const float* total) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = values + r * ld;
    const float factor = 1.0f / total[r];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) row[c] *= factor;
  }
}

}  // namespace

template <>
const TransformerLoops& loops() {
  static const TransformerLoops table{patches, normalise, repeat, activate, exponentials, divide};
  return table;
}

}  // namespace rada_fast::RADA_CAPABILITY
