#include "augmix_loops.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rada_fast::RADA_CAPABILITY {
namespace {

void join(const uint16_t* const* rows, int64_t count, uint32_t* out) {
  const uint16_t *red = rows[0], *green = rows[1], *blue = rows[2];
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<uint32_t>(red[i]) | static_cast<uint32_t>(green[i]) << 8 | static_cast<uint32_t>(blue[i]) << 16;
}

void histogram(const uint32_t* image, int64_t size, int64_t stride, uint32_t* counts) {
  // Neighbouring pixels are often equal. With two sets of counters, one increment need not wait for the other.
  uint32_t sets[2][3 * 256];
  std::memset(sets, 0, sizeof(sets));
  for (int64_t y = 0; y < size; ++y) {
    const uint32_t* row = image + y * stride;
    for (int64_t x = 0; x < size; ++x) {
      uint32_t* set = sets[x % 2];
      const uint32_t pixel = row[x];
      ++set[pixel & 255];
      ++set[256 + (pixel >> 8 & 255)];
      ++set[512 + (pixel >> 16 & 255)];
    }
  }
  for (int i = 0; i < 3 * 256; ++i) counts[i] = sets[0][i] + sets[1][i];
}

void look_up(const uint32_t* image, int64_t size, int64_t stride, const uint8_t* table, uint32_t* out) {
  for (int64_t y = 0; y < size; ++y) {
    const uint32_t* row = image + y * stride;
    uint32_t* to = out + y * stride;
    for (int64_t x = 0; x < size; ++x) {
      const uint32_t pixel = row[x];
      to[x] = static_cast<uint32_t>(table[pixel & 255]) | static_cast<uint32_t>(table[256 + (pixel >> 8 & 255)]) << 8 |
              static_cast<uint32_t>(table[512 + (pixel >> 16 & 255)]) << 16;
    }
  }
}

void repeat_edge(uint32_t* image, int64_t size, int64_t stride) {
  for (int64_t y = 0; y < size; ++y) {
    image[y * stride - 1] = image[y * stride];
    image[y * stride + size] = image[y * stride + size - 1];
  }
  std::memcpy(image - stride - 1, image - 1, (size + 2) * sizeof(uint32_t));
  std::memcpy(image + size * stride - 1, image + (size - 1) * stride - 1, (size + 2) * sizeof(uint32_t));
}

// Mixes four neighbours in double precision, as Pillow's bilinear filter does; `at` is the upper left one.
inline uint32_t between(const uint32_t* at, int64_t stride, double right, double down) {
#if defined(__AVX2__)
  const auto four = [](__m128i pixels) { return _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(pixels)); };
  const __m128i upper = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + stride));
  const __m256d x = _mm256_set1_pd(right), y = _mm256_set1_pd(down);
  const __m256d upper_left = four(upper), lower_left = four(lower);
  const __m256d above =
      _mm256_add_pd(upper_left, _mm256_mul_pd(_mm256_sub_pd(four(_mm_srli_si128(upper, 4)), upper_left), x));
  const __m256d below =
      _mm256_add_pd(lower_left, _mm256_mul_pd(_mm256_sub_pd(four(_mm_srli_si128(lower, 4)), lower_left), x));
  const __m128i found =
      _mm256_cvttpd_epi32(_mm256_add_pd(above, _mm256_mul_pd(_mm256_sub_pd(below, above), y)));
  return static_cast<uint32_t>(
      _mm_cvtsi128_si32(_mm_shuffle_epi8(found, _mm_setr_epi32(0x0c080400, -1, -1, -1))));
#else
  uint32_t found = 0;
  for (int shift = 0; shift < 24; shift += 8) {
    const auto value = [&](int64_t offset) { return static_cast<double>(at[offset] >> shift & 255); };
    const double above = value(0) + (value(1) - value(0)) * right;
    const double below = value(stride) + (value(stride + 1) - value(stride)) * right;
    found |= static_cast<uint32_t>(static_cast<uint8_t>(above + (below - above) * down)) << shift;
  }
  return found;
#endif
}

void transform(const uint32_t* image, int64_t size, int64_t stride, const double* matrix, double* scratch,
               uint32_t* out) {
  const double across = matrix[2], down = matrix[5], extent = static_cast<double>(size);
  if (matrix[0] == 1 && matrix[1] == 0 && matrix[3] == 0 && matrix[4] == 1 && across == std::floor(across) &&
      down == std::floor(down)) {
    // This is a shift by whole pixels, so every weight is 0 or 1.
    const int64_t dx = static_cast<int64_t>(across), dy = static_cast<int64_t>(down);
    const int64_t first = dx < 0 ? (-dx < size ? -dx : size) : 0, last = dx > 0 ? (dx < size ? size - dx : 0) : size;
    for (int64_t y = 0; y < size; ++y) {
      uint32_t* to = out + y * stride;
      std::memset(to, 0, size * sizeof(uint32_t));
      if (y + dy >= 0 && y + dy < size && first < last)
        std::memcpy(to + first, image + (y + dy) * stride + first + dx, (last - first) * sizeof(uint32_t));
    }
    return;
  }
  double *x_part = scratch, *y_part = scratch + size, *right = scratch + 2 * size, *below = scratch + 3 * size;
  int32_t* const places = reinterpret_cast<int32_t*>(scratch + 4 * size);
  constexpr int32_t outside = INT32_MIN;
  for (int64_t x = 0; x < size; ++x) {
    x_part[x] = matrix[0] * (static_cast<double>(x) + 0.5);
    y_part[x] = matrix[3] * (static_cast<double>(x) + 0.5);
  }
  for (int64_t y = 0; y < size; ++y) {
    const double x_row = matrix[1] * (static_cast<double>(y) + 0.5), y_row = matrix[4] * (static_cast<double>(y) + 0.5);
    for (int64_t x = 0; x < size; ++x) {
      const double from_x = x_part[x] + x_row + across, from_y = y_part[x] + y_row + down;
      const bool inside = (from_x >= 0.0) & (from_x < extent) & (from_y >= 0.0) & (from_y < extent);
      const double left = inside ? std::floor(from_x - 0.5) : 0.0, top = inside ? std::floor(from_y - 0.5) : 0.0;
      right[x] = from_x - 0.5 - left;
      below[x] = from_y - 0.5 - top;
      const int32_t place = static_cast<int32_t>(top) * static_cast<int32_t>(stride) + static_cast<int32_t>(left);
      places[x] = inside ? place : outside;
    }
    uint32_t* to = out + y * stride;
    for (int64_t x = 0; x < size; ++x)
      to[x] = places[x] == outside ? 0 : between(image + places[x], stride, right[x], below[x]);
  }
}

void mix(const MixTerm& plain, const MixTerm* terms, int64_t count, float rest, int64_t channel, int64_t row,
         int64_t size, int64_t stride, float* out) {
  const int shift = static_cast<int>(8 * channel);
  const auto term = [&](const MixTerm& t, int64_t x) {
    return t.values[channel * 256 + (t.image[row * stride + x] >> shift & 255)];
  };
  for (int64_t x = 0; x < size; ++x) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += term(terms[i], x);
    out[x] = term(plain, x) + rest * sum;
  }
}

// Python's round(value, 15): to the nearest decimal, which printf and strtod find exactly.
double rounded(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.15f", value);
  return std::strtod(text, nullptr);
}

void rotation(double degrees, int64_t size, double* matrix) {
  double turn = std::fmod(degrees, 360.0);
  if (turn < 0) turn += 360.0;
  const double angle = -(turn * (3.14159265358979323846 / 180.0));
  matrix[0] = matrix[4] = rounded(std::cos(angle));
  matrix[1] = rounded(std::sin(angle));
  matrix[3] = rounded(-std::sin(angle));
  const double centre = static_cast<double>(size) / 2;
  matrix[2] = matrix[0] * -centre + matrix[1] * -centre + 0.0 + centre;
  matrix[5] = matrix[3] * -centre + matrix[4] * -centre + 0.0 + centre;
}

}  // namespace

template <>
const AugmixLoops& loops() {
  static const AugmixLoops functions{join, histogram, look_up, repeat_edge, transform, mix, rotation};
  return functions;
}

}  // namespace rada_fast::RADA_CAPABILITY
