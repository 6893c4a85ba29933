#include "view_loops.h"

#include <cmath>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rada_fast::RADA_CAPABILITY {
namespace {

constexpr int32_t kHalf = 1 << (kWeightBits - 1);

inline double filter(bool bicubic, double x) {
  x = std::fabs(x);
  if (!bicubic) return x < 1.0 ? 1.0 - x : 0.0;
  constexpr double a = -0.5;
  const double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  const double far = (((x - 5) * x + 8) * x - 4) * a;
  return x < 1.0 ? near : (x < 2.0 ? far : 0.0);
}

// Pillow's precompute_coeffs and normalize_coeffs_8bpc (Resample.c), over a window of the outputs.
template <bool bicubic>
void weights_of(const Axis& axis, double* scratch, const AxisWeights& out) {
  const double scale = static_cast<double>(static_cast<float>(axis.in_size)) / static_cast<double>(axis.out_size);
  const double filter_scale = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / filter_scale;
  const double support = (bicubic ? 2.0 : 1.0) * filter_scale;
  constexpr int64_t chunk = 64;
  for (int64_t begin = 0; begin < out.padded; begin += chunk) {
    double center[chunk], total[chunk];
    int32_t first[chunk], taps[chunk];
    int32_t most = 0;
    const int32_t last = static_cast<int32_t>(axis.count - 1), size = static_cast<int32_t>(axis.in_size);
    const int32_t window = static_cast<int32_t>(axis.window), origin = static_cast<int32_t>(begin);
    for (int32_t i = 0; i < chunk; ++i) {
      // Outputs past the end repeat the last one and are never stored.
      const int32_t at = origin + i < last ? origin + i : last;
      center[i] = (static_cast<double>(window + (axis.reversed ? last - at : at)) + 0.5) * scale;
      const int32_t low = static_cast<int32_t>(center[i] - support + 0.5);
      const int32_t high = static_cast<int32_t>(center[i] + support + 0.5);
      first[i] = low < 0 ? 0 : low;
      taps[i] = (high > size ? size : high) - first[i];
      most = taps[i] > most ? taps[i] : most;
      total[i] = 0.0;
    }
    for (int32_t tap = 0; tap < most; ++tap) {
      double* row = scratch + tap * chunk;
      for (int64_t i = 0; i < chunk; ++i) {
        const double x = (static_cast<double>(tap + first[i]) - center[i] + 0.5) * inverse;
        row[i] = tap < taps[i] ? filter(bicubic, x) : 0.0;
        total[i] += row[i];
      }
    }
    for (int32_t tap = 0; tap < out.most_taps; ++tap) {
      const double* row = scratch + tap * chunk;
      int32_t* to = out.weights + tap * out.padded + begin;
      if (tap >= most) {
        std::memset(to, 0, chunk * sizeof(int32_t));
        continue;
      }
      for (int64_t i = 0; i < chunk; ++i) {
        const double weight = (total[i] != 0.0 ? row[i] / total[i] : row[i]) * (1 << kWeightBits);
        to[i] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
    }
    std::memcpy(out.first + begin, first, sizeof(first));
    std::memcpy(out.taps + begin, taps, sizeof(taps));
  }
}

void axis_weights(const Axis& axis, double* scratch, const AxisWeights& out) {
  axis.bicubic ? weights_of<true>(axis, scratch, out) : weights_of<false>(axis, scratch, out);
}

inline uint16_t clipped(uint32_t sum) {
  const int32_t value = static_cast<int32_t>(sum) >> kWeightBits;
  return static_cast<uint16_t>(value < 0 ? 0 : (value > 255 ? 255 : value));
}

void split_tail(const uint8_t* pixels, int64_t from, int64_t count, uint8_t* red, uint8_t* green, uint8_t* blue) {
  for (int64_t i = from; i < count; ++i) {
    red[i] = pixels[3 * i];
    green[i] = pixels[3 * i + 1];
    blue[i] = pixels[3 * i + 2];
  }
}

#if defined(__AVX2__)

// A weight of up to 24 bits is high * 2^15 + low with 0 <= low < 2^15. The product with a weight becomes two 16-bit products,
// whose sums are exact modulo 2^32, like Pillow's.
constexpr int kLowBits = 15;
inline int16_t low_of(int32_t weight) { return static_cast<int16_t>(weight & ((1 << kLowBits) - 1)); }
inline int16_t high_of(int32_t weight) { return static_cast<int16_t>(weight >> kLowBits); }

// The vectors of this instruction set. RADA_VECTOR(operation) is the intrinsic of that name for their width.
#if defined(__AVX512BW__)
#define RADA_VECTOR(operation) _mm512_##operation
using Int = __m512i;
using Float = __m512;
inline Int load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Int v) { _mm512_storeu_si512(p, v); }
inline Int zero() { return _mm512_setzero_si512(); }
template <typename Lane>
inline Int window(Lane lane) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline Float words_to_float(const uint16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#else
#define RADA_VECTOR(operation) _mm256_##operation
using Int = __m256i;
using Float = __m256;
inline Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Int zero() { return _mm256_setzero_si256(); }
template <typename Lane>
inline Int window(Lane lane) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
}
inline Float words_to_float(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#endif
constexpr int kLanes = sizeof(Int) / 16, kFloats = sizeof(Float) / sizeof(float);

inline Int spread(int32_t v) { return RADA_VECTOR(set1_epi32)(v); }
inline Int add(Int a, Int b) { return RADA_VECTOR(add_epi32)(a, b); }
inline Int dot(Int a, Int b) { return RADA_VECTOR(madd_epi16)(a, b); }
inline Int shuffle(Int a, Int b) { return RADA_VECTOR(shuffle_epi8)(a, b); }
inline Int up(Int a) { return RADA_VECTOR(slli_epi32)(a, kLowBits); }
inline Int down(Int a) { return RADA_VECTOR(srai_epi32)(a, kWeightBits); }
inline Int pack(Int a, Int b) { return RADA_VECTOR(packs_epi32)(a, b); }
inline Int pack_bytes(Int a, Int b) { return RADA_VECTOR(packus_epi16)(a, b); }
inline Int low_bytes(Int a, Int b) { return RADA_VECTOR(unpacklo_epi8)(a, b); }
inline Int high_bytes(Int a, Int b) { return RADA_VECTOR(unpackhi_epi8)(a, b); }
inline Int low_pairs(Int a, Int b) { return RADA_VECTOR(unpacklo_epi16)(a, b); }
inline Int high_pairs(Int a, Int b) { return RADA_VECTOR(unpackhi_epi16)(a, b); }
inline Int byte_range(Int a) {
  return RADA_VECTOR(min_epi16)(RADA_VECTOR(max_epi16)(a, zero()), RADA_VECTOR(set1_epi16)(255));
}
inline Float spread(float v) { return RADA_VECTOR(set1_ps)(v); }
inline void store(float* p, Float v) { RADA_VECTOR(storeu_ps)(p, v); }
inline Float multiply(Float a, Float b) { return RADA_VECTOR(mul_ps)(a, b); }
inline Float subtract(Float a, Float b) { return RADA_VECTOR(sub_ps)(a, b); }
inline Float fused(Float a, Float b, Float c) { return RADA_VECTOR(fmadd_ps)(a, b, c); }
inline Float fused_negated(Float a, Float b, Float c) { return RADA_VECTOR(fnmadd_ps)(a, b, c); }
#undef RADA_VECTOR

constexpr int kBytes = 16 * kLanes;
// The number of outputs of two vectors, whose 32-bit results are packed into one vector of 16-bit words.
constexpr int kPair = 8 * kLanes;

// Four outputs share a lane of 16 bytes. Packing takes the lanes of two vectors in turn. The first vector of a pair
// therefore holds the blocks 0, 2, ... of its outputs and the second one 1, 3, ..., which makes the words come out in
// order.
inline int64_t block_of(int64_t vector, int lane) { return vector / 2 * 2 * kLanes + 2 * lane + vector % 2; }

void pack_columns(Columns& columns) {
  const AxisWeights& axis = columns.axis;
  columns.wide = false;
  for (int64_t block = 0; block < axis.padded / 4; ++block) {
    const int32_t* first = axis.first + 4 * block;
    const int32_t low = first[0] < first[3] ? first[0] : first[3], high = first[0] < first[3] ? first[3] : first[0];
    columns.offsets[4 * block] = low;
    if (high - low + 4 > 16) columns.wide = true;
  }
  if (columns.wide) std::memcpy(columns.offsets, axis.first, axis.padded * sizeof(int32_t));
  for (int64_t vector = 0; vector < axis.padded / (4 * kLanes); ++vector) {
    uint8_t* shuffles = columns.shuffles + vector * 2 * kBytes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t block = block_of(vector, lane);
      for (int output = 0; output < 4; ++output) {
        const int32_t at = columns.wide ? 4 * output : axis.first[4 * block + output] - columns.offsets[4 * block];
        for (int tap = 0; tap < 4; ++tap) {
          uint8_t* to = shuffles + (tap / 2) * kBytes + 16 * lane + 4 * output + 2 * (tap % 2);
          to[0] = static_cast<uint8_t>(at + tap);
          to[1] = 0x80;
        }
        for (int64_t group = 0; group < columns.groups; ++group) {
          int16_t* products = columns.products + (group * axis.padded * 8) + vector * 2 * kBytes;
          for (int tap = 0; tap < 4; ++tap) {
            const int64_t index = 4 * group + tap;
            const int32_t weight =
                index < axis.most_taps ? axis.weights[index * axis.padded + 4 * block + output] : 0;
            const int64_t place = 8 * lane + 2 * output + tap % 2;
            products[(tap / 2) * (kBytes / 2) + place] = low_of(weight);
            products[(2 + tap / 2) * (kBytes / 2) + place] = high_of(weight);
          }
        }
      }
    }
  }
}

inline __m128i four_pixels(const uint8_t* row, const int32_t* offsets) {
  int32_t words[4];
  for (int i = 0; i < 4; ++i) std::memcpy(words + i, row + offsets[i], 4);
  return _mm_setr_epi32(words[0], words[1], words[2], words[3]);
}

template <bool wide>
inline Int pixels_of(const uint8_t* row, const int32_t* offsets, int64_t vector) {
  return window([&](int lane) {
    const int64_t block = block_of(vector, lane);
    if constexpr (wide) return four_pixels(row, offsets + 4 * block);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + offsets[4 * block]));
  });
}

template <bool wide>
void horizontal_of(const Columns& columns, const uint8_t* const* planes, uint16_t* const* out) {
  const Int half = spread(kHalf);
  for (int64_t pair = 0; pair < columns.axis.padded / kPair; ++pair) {
    Int sums[3][2];
    for (int side = 0; side < 2; ++side) {
      const int64_t vector = 2 * pair + side;
      const uint8_t* shuffles = columns.shuffles + vector * 2 * kBytes;
      const Int first = load(shuffles), second = load(shuffles + kBytes);
      Int low[3] = {half, half, half}, high[3] = {zero(), zero(), zero()};
      for (int64_t group = 0; group < columns.groups; ++group) {
        const int16_t* products = columns.products + group * columns.axis.padded * 8 + vector * 2 * kBytes;
        const Int low01 = load(products), low23 = load(products + kBytes / 2);
        const Int high01 = load(products + kBytes), high23 = load(products + 3 * kBytes / 2);
        for (int plane = 0; plane < 3; ++plane) {
          const Int pixels = pixels_of<wide>(planes[plane] + 4 * group, columns.offsets, vector);
          const Int taps01 = shuffle(pixels, first), taps23 = shuffle(pixels, second);
          low[plane] = add(low[plane], add(dot(taps01, low01), dot(taps23, low23)));
          high[plane] = add(high[plane], add(dot(taps01, high01), dot(taps23, high23)));
        }
      }
      for (int plane = 0; plane < 3; ++plane) sums[plane][side] = down(add(low[plane], up(high[plane])));
    }
    for (int plane = 0; plane < 3; ++plane)
      store(out[plane] + pair * kPair, byte_range(pack(sums[plane][0], sums[plane][1])));
  }
}

void horizontal(const Columns& columns, const uint8_t* const* planes, uint16_t* const* out) {
  columns.wide ? horizontal_of<true>(columns, planes, out) : horizontal_of<false>(columns, planes, out);
}

inline int32_t two(int16_t a, int16_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(a)) |
                              static_cast<uint32_t>(static_cast<uint16_t>(b)) << 16);
}

// Sums of products with the weights of two taps: four vectors of 32-bit sums, with low and high parts kept apart.
struct VerticalSums {
  Int low[4], high[4];
  VerticalSums() {
    for (int i = 0; i < 4; ++i) {
      low[i] = spread(kHalf);
      high[i] = zero();
    }
  }
  // Returns the sum of vector i, shifted back to whole numbers.
  Int shifted(int i) const { return down(add(low[i], up(high[i]))); }
};

// The weights of two taps in every 32-bit word; the second is zero past the last tap.
struct PairWeights {
  Int low, high;
  PairWeights(const int32_t* weights, int64_t tap, bool whole) {
    const int32_t a = weights[tap], b = whole ? weights[tap + 1] : 0;
    low = spread(two(low_of(a), low_of(b)));
    high = spread(two(high_of(a), high_of(b)));
  }
};

inline void multiply_add(VerticalSums& sums, int i, Int pair, const PairWeights& weights) {
  sums.low[i] = add(sums.low[i], dot(pair, weights.low));
  sums.high[i] = add(sums.high[i], dot(pair, weights.high));
}

void vertical(const uint16_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint16_t* out) {
  constexpr int64_t step = 2 * kPair;  // two vectors of words share the spread weights
  for (int64_t at = 0; at < padded; at += step) {
    VerticalSums sums;
    for (int64_t tap = 0; tap < taps; tap += 2) {
      const bool whole = tap + 1 < taps;
      const PairWeights pair_weights(weights, tap, whole);
      const uint16_t *upper = rows[tap] + at, *lower = (whole ? rows[tap + 1] : rows[tap]) + at;
      for (int i = 0; i < 2; ++i) {
        const Int above = load(upper + i * kPair), below = load(lower + i * kPair);
        multiply_add(sums, 2 * i, low_pairs(above, below), pair_weights);
        multiply_add(sums, 2 * i + 1, high_pairs(above, below), pair_weights);
      }
    }
    for (int i = 0; i < 2; ++i)
      store(out + at + i * kPair, byte_range(pack(sums.shifted(2 * i), sums.shifted(2 * i + 1))));
  }
}

void vertical_pixels(const uint8_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint8_t* out) {
  for (int64_t at = 0; at < padded; at += kBytes) {
    VerticalSums sums;
    for (int64_t tap = 0; tap < taps; tap += 2) {
      const bool whole = tap + 1 < taps;
      const PairWeights pair_weights(weights, tap, whole);
      const Int above = load(rows[tap] + at), below = load((whole ? rows[tap + 1] : rows[tap]) + at);
      const Int left = low_bytes(above, below), right = high_bytes(above, below);
      const Int pairs[4] = {low_bytes(left, zero()), high_bytes(left, zero()), low_bytes(right, zero()),
                            high_bytes(right, zero())};
      for (int i = 0; i < 4; ++i) multiply_add(sums, i, pairs[i], pair_weights);
    }
    store(out + at,
          pack_bytes(pack(sums.shifted(0), sums.shifted(1)), pack(sums.shifted(2), sums.shifted(3))));
  }
}

void split(const uint8_t* pixels, int64_t count, uint8_t* red, uint8_t* green, uint8_t* blue) {
  // picks says which of 48 bytes each plane takes: plane p takes the bytes p, p + 3, ... of the three loads.
  alignas(16) uint8_t picks[3][3][16];
  std::memset(picks, 0x80, sizeof(picks));
  for (int plane = 0; plane < 3; ++plane)
    for (int i = 0; i < 16; ++i) {
      const int at = 3 * i + plane;
      picks[plane][at / 16][i] = static_cast<uint8_t>(at % 16);
    }
  uint8_t* const planes[3] = {red, green, blue};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m128i in[3];
    for (int part = 0; part < 3; ++part)
      in[part] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + 3 * i + 16 * part));
    for (int plane = 0; plane < 3; ++plane) {
      __m128i found = _mm_setzero_si128();
      for (int part = 0; part < 3; ++part)
        found = _mm_or_si128(
            found, _mm_shuffle_epi8(in[part], _mm_load_si128(reinterpret_cast<const __m128i*>(picks[plane][part]))));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[plane] + i), found);
    }
  }
  split_tail(pixels, i, count, red, green, blue);
}

// Computes a quotient by a product and one correction. `prepare` uses it only where all 256 results equal the table's.
inline Float quotient(Float value, Float divisor, Float inverse) {
  const Float guess = multiply(value, inverse);
  return fused(fused_negated(guess, divisor, value), inverse, guess);
}
inline Float normalised(const uint16_t* values, const Normalisation& n) {
  const Float share = quotient(words_to_float(values), spread(255.0f), spread(1.0f / 255.0f));
  return quotient(subtract(share, spread(n.mean)), spread(n.std), spread(n.inverse));
}

void prepare(Normalisation& normalisation) {
  uint16_t values[256];
  float found[256];
  for (int i = 0; i < 256; ++i) values[i] = static_cast<uint16_t>(i);
  for (int i = 0; i < 256; i += kFloats) store(found + i, normalised(values + i, normalisation));
  normalisation.direct = std::memcmp(found, normalisation.table, sizeof(found)) == 0;
}

void normalise(const uint16_t* values, int64_t count, const Normalisation& normalisation, float* out) {
  int64_t i = 0;
  if (normalisation.direct)
    for (; i + kFloats <= count; i += kFloats) store(out + i, normalised(values + i, normalisation));
  for (; i < count; ++i) out[i] = normalisation.table[values[i]];
}

#else

void pack_columns(Columns&) {}

void horizontal(const Columns& columns, const uint8_t* const* planes, uint16_t* const* out) {
  const AxisWeights& axis = columns.axis;
  for (int plane = 0; plane < 3; ++plane)
    for (int64_t i = 0; i < axis.padded; ++i) {
      const uint8_t* pixels = planes[plane] + axis.first[i];
      uint32_t sum = kHalf;
      for (int32_t tap = 0; tap < axis.taps[i]; ++tap)
        sum += static_cast<uint32_t>(pixels[tap]) * static_cast<uint32_t>(axis.weights[tap * axis.padded + i]);
      out[plane][i] = clipped(sum);
    }
}

template <typename T>
void vertical_of(const T* const* rows, const int32_t* weights, int64_t taps, int64_t padded, T* out) {
  constexpr int64_t chunk = 64;
  for (int64_t begin = 0; begin < padded; begin += chunk) {
    uint32_t sums[chunk];
    for (int64_t i = 0; i < chunk; ++i) sums[i] = kHalf;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < chunk; ++i)
        sums[i] += static_cast<uint32_t>(rows[tap][begin + i]) * static_cast<uint32_t>(weights[tap]);
    for (int64_t i = 0; i < chunk; ++i) out[begin + i] = static_cast<T>(clipped(sums[i]));
  }
}
void vertical(const uint16_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint16_t* out) {
  vertical_of(rows, weights, taps, padded, out);
}
void vertical_pixels(const uint8_t* const* rows, const int32_t* weights, int64_t taps, int64_t padded, uint8_t* out) {
  vertical_of(rows, weights, taps, padded, out);
}

void split(const uint8_t* pixels, int64_t count, uint8_t* red, uint8_t* green, uint8_t* blue) {
  split_tail(pixels, 0, count, red, green, blue);
}

void prepare(Normalisation& normalisation) { normalisation.direct = false; }

void normalise(const uint16_t* values, int64_t count, const Normalisation& normalisation, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = normalisation.table[values[i]];
}

#endif

}  // namespace

template <>
const ViewLoops& loops() {
  static const ViewLoops functions{axis_weights, pack_columns,    split,   horizontal,
                                   vertical,     vertical_pixels, prepare, normalise};
  return functions;
}

}  // namespace rada_fast::RADA_CAPABILITY
