// Loads and stores rows of logits by warps, 16 bytes at a time for every alignment of a row, and computes their
// statistics.
//
// A row of K logits starts at any multiple of its type's size. A warp reads the aligned 16-byte words that cover its part
// of the row, including those that it shares with its neighbours at the borders, and shifts them into place. A lane then
// holds the same elements for every alignment, so that equal rows are summed in the same order and give equal bits.
// Element i of chunk c of lane l of a part that starts at class k0 is class k0 + (c * 32 + l) * kPack + i.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../shared/accumulate_type.h"

namespace rada_fast {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

template <typename T>
constexpr int kPack = 16 / sizeof(T);  // elements of a 16-byte word
template <typename T>
constexpr int kChunk = kWarpSize * kPack<T>;  // elements that a warp takes with one word per lane

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float log_one_plus(float x) { return log1pf(x); }
__device__ inline double log_one_plus(double x) { return log1p(x); }
// Returns the larger of two numbers; of a number and a NaN it returns the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

template <typename A>
__device__ inline A infinity() {
  return static_cast<A>(__int_as_float(0x7f800000));
}
template <typename A>
__device__ inline A not_a_number() {
  return static_cast<A>(__int_as_float(0x7fc00000));
}

// ---- 16-byte words

__device__ inline uint32_t part(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : i == 2 ? word.z : word.w;
}
// The members are written one by one, here and below, because a reference to one of them would put the words into memory.
__device__ inline void set_part(uint4& word, int i, uint32_t bits) {
  if (i == 0) word.x = bits;
  if (i == 1) word.y = bits;
  if (i == 2) word.z = bits;
  if (i == 3) word.w = bits;
}

template <typename T>
__device__ inline Acc<T> element(const uint4& word, int i) {
  if constexpr (sizeof(T) == 8) {
    return __hiloint2double(static_cast<int>(part(word, 2 * i + 1)), static_cast<int>(part(word, 2 * i)));
  } else if constexpr (sizeof(T) == 4) {
    return __uint_as_float(part(word, i));
  } else {
    const uint32_t pair = part(word, i / 2);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    else
      return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? pair >> 16 : pair)));
  }
}

__device__ inline float exact(float x) { return x; }
__device__ inline double exact(double x) { return x; }
__device__ inline float exact(__half x) { return __half2float(x); }
__device__ inline float exact(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline uint32_t half_bits(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  else
    return __half_as_ushort(__float2half_rn(x));
}

// word's element i = x; the elements are set in ascending order.
template <typename T>
__device__ inline void set_element(uint4& word, int i, Acc<T> x) {
  if constexpr (sizeof(T) == 8) {
    set_part(word, 2 * i, static_cast<uint32_t>(__double2loint(x)));
    set_part(word, 2 * i + 1, static_cast<uint32_t>(__double2hiint(x)));
  } else if constexpr (sizeof(T) == 4) {
    set_part(word, i, __float_as_uint(x));
  } else {
    const uint32_t bits = half_bits<T>(x);
    set_part(word, i / 2, i % 2 ? part(word, i / 2) | bits << 16 : bits);
  }
}

__device__ inline uint4 chosen(bool first, const uint4& a, const uint4& b) {
  return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
}

__device__ inline uint4 shuffle(const uint4& word, int lane) {
  return {__shfl_sync(kAllLanes, word.x, lane), __shfl_sync(kAllLanes, word.y, lane),
          __shfl_sync(kAllLanes, word.z, lane), __shfl_sync(kAllLanes, word.w, lane)};
}

// Returns the 16 bytes that start `shift` bytes into the 32 bytes of low and high. shift: from 0 to 16, a multiple of
// 2, the same in the whole warp.
__device__ inline uint4 window(const uint4& low, const uint4& high, unsigned shift) {
  if (shift == 16) return high;
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8)
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  if (shift & 4)
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  const unsigned bits = shift & 2 ? 16 : 0;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// Loads a word that lies only partly inside the tensor, with 0 for the elements outside.
template <typename T>
__device__ inline uint4 load_cut(const char* at, const char* begin, const char* end) {
  using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, std::conditional_t<sizeof(T) == 4, uint32_t, uint2>>;
  uint4 word = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    const char* address = at + i * sizeof(T);
    if (address < begin || address >= end) continue;
    const Bits bits = *reinterpret_cast<const Bits*>(address);
    if constexpr (sizeof(T) == 8) {
      set_part(word, 2 * i, bits.x);
      set_part(word, 2 * i + 1, bits.y);
    } else if constexpr (sizeof(T) == 4) {
      set_part(word, i, bits);
    } else {
      set_part(word, i / 2, part(word, i / 2) | static_cast<uint32_t>(bits) << (i % 2 * 16));
    }
  }
  return word;
}

template <typename T>
struct Span {
  const T *begin, *end;  // of the whole tensor
};

__device__ inline unsigned misalignment(const void* pointer) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer)) & 15u;
}

// Loads a row from class k0 on into `chunks` words per lane; elements past the row may be anything. All lanes call it.
template <typename T, int chunks>
__device__ inline void load_part(const T* row, int64_t classes, int64_t k0, const Span<T>& span, uint4 (&words)[chunks]) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned shift = misalignment(row);
  const auto *begin = reinterpret_cast<const char*>(span.begin), *end = reinterpret_cast<const char*>(span.end);
  const char* first = reinterpret_cast<const char*>(row + k0) - shift;
  const char* stop = reinterpret_cast<const char*>(row + classes);
  const char* filled = end - misalignment(end);
  const char* whole = stop < filled ? stop : filled;  // words before it may be loaded
  constexpr int beyond = chunks * kWarpSize;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const char* at = first + (c * kWarpSize + lane) * 16;
    words[c] = at >= begin && at < whole ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{0, 0, 0, 0};
  }
  uint4 last = {0, 0, 0, 0};  // in lane 0: the word after the last one, which shifting needs
  if (shift && lane == 0 && first + beyond * 16 < whole)
    last = __ldg(reinterpret_cast<const uint4*>(first + beyond * 16));
  // The first and the last word of the tensor, where it does not fill them.
  if (first < begin && lane == 0) words[0] = load_cut<T>(first, begin, end);
  if (whole < stop && whole >= begin && whole < first + (beyond + (shift ? 1 : 0)) * 16) {
    const int index = static_cast<int>((whole - first) / 16);
    if (index % kWarpSize == lane) {
      const uint4 cut = load_cut<T>(whole, begin, end);
      last = chosen(index == beyond, cut, last);
#pragma unroll
      for (int c = 0; c < chunks; ++c) words[c] = chosen(index / kWarpSize == c, cut, words[c]);
    }
  }
  if (shift == 0) return;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    // Lane 31's neighbour is lane 0 of the next chunk.
    const uint4 giving = chosen(lane == 0, c + 1 < chunks ? words[c + 1 < chunks ? c + 1 : c] : last, words[c]);
    words[c] = window(words[c], shuffle(giving, (lane + 1) % kWarpSize), shift);
  }
}

// The counterpart of load_part: it stores whole words inside the row's part, and single elements at its two borders.
template <typename T, int chunks>
__device__ inline void store_part(T* row, int64_t classes, int64_t k0, uint4 (&words)[chunks]) {
  using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, std::conditional_t<sizeof(T) == 4, uint32_t, uint2>>;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned shift = misalignment(row);
  const int64_t left = classes - k0;
  const int elements = static_cast<int>(left < chunks * kChunk<T> ? left : chunks * kChunk<T>);
  const int ahead = static_cast<int>(shift / sizeof(T));  // elements of the first word that belong to another part
  char* first = reinterpret_cast<char*>(row + k0) - shift;
  uint4 beyond = {0, 0, 0, 0};
  if (shift) {
    beyond = window(shuffle(words[chunks - 1], kWarpSize - 1), uint4{0, 0, 0, 0}, 16 - shift);
#pragma unroll
    for (int c = chunks - 1; c >= 0; --c) {
      const uint4 giving = chosen(lane == kWarpSize - 1, words[c > 0 ? c - 1 : 0], words[c]);
      const uint4 before = shuffle(giving, (lane + kWarpSize - 1) % kWarpSize);
      words[c] = window(before, words[c], 16 - shift);
    }
  }
  // In elements from the first word's beginning the part is ahead .. ahead + elements.
  const int end = ahead + elements, cut_word = end / kPack<T>, cut = end % kPack<T>;
  uint4 head = {0, 0, 0, 0}, tail = {0, 0, 0, 0};
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const int word = c * kWarpSize + lane;
    if (word * kPack<T> >= ahead && (word + 1) * kPack<T> <= end) *reinterpret_cast<uint4*>(first + word * 16) = words[c];
    tail = chosen(cut_word / kWarpSize == c, words[c], tail);
  }
  tail = chosen(cut_word == chunks * kWarpSize, beyond, tail);
  tail = shuffle(tail, cut_word % kWarpSize);
  if (ahead) head = shuffle(words[0], 0);
  if (!ahead && !cut) return;
  // One store for both borders: lanes 0 .. 15 the first word's elements, lanes 16 .. 31 the last one's.
  const int i = lane % 16, at = (lane < 16 ? 0 : cut_word * kPack<T>) + i;
  const bool at_border = lane < 16 ? ahead > 0 : cut > 0 && (cut_word > 0 || !ahead);
  const bool stores = i < kPack<T> && at >= ahead && at < end && at_border;
  const uint4 from = chosen(lane < 16, head, tail);
  Bits bits{};
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    if (j != i) continue;
    if constexpr (sizeof(T) == 8)
      bits = {part(from, 2 * j), part(from, 2 * j + 1)};
    else if constexpr (sizeof(T) == 4)
      bits = part(from, j);
    else
      bits = static_cast<unsigned short>(part(from, j / 2) >> (j % 2 * 16));
  }
  if (stores) *reinterpret_cast<Bits*>(first + at * static_cast<int>(sizeof(T))) = bits;
}

// ---- reductions over a warp; all lanes get lane 0's result

template <typename A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) x += __shfl_down_sync(kAllLanes, x, distance);
  return __shfl_sync(kAllLanes, x, 0);
}
template <typename A>
__device__ inline A warp_largest(A x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// ---- a prediction's statistics

// With d = largest - x: others = sum exp(-d) over all logits but one of the largest, spread = sum exp(-d) d. So
// ln sum exp(x - largest) = ln(1 + others) and entropy = ln(1 + others) + spread / (1 + others). No term cancels
// another, so a confident prediction's small entropy keeps its digits. Without any logit, largest is -inf and both sums 0.
template <typename A>
struct RowStatistics {
  A largest, others, spread;
};

template <typename A>
__device__ inline RowStatistics<A> no_statistics() {
  return {-infinity<A>(), A(0), A(0)};
}

template <typename A>
__device__ inline RowStatistics<A> merged(const RowStatistics<A>& a, const RowStatistics<A>& b) {
  const bool first = a.largest >= b.largest;
  const A high = first ? a.largest : b.largest, low = first ? b.largest : a.largest;
  const A low_others = first ? b.others : a.others, low_spread = first ? b.spread : a.spread;
  const bool some = low > -infinity<A>();
  const A distance = some ? high - low : A(0);
  const A factor = some ? exponential(-distance) : A(0);
  // A NaN times 0 stays NaN.
  const A all = factor == 0 ? low_others * A(0) : factor * (1 + low_others);
  const A spread = factor == 0 ? A(0) : factor * low_spread + all * distance;
  return {high, (first ? a.others : b.others) + all, (first ? a.spread : b.spread) + spread};
}

template <typename A>
__device__ inline RowStatistics<A> warp_merged(RowStatistics<A> row) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance; distance /= 2)
    row = merged(row, {__shfl_down_sync(kAllLanes, row.largest, distance),
                       __shfl_down_sync(kAllLanes, row.others, distance),
                       __shfl_down_sync(kAllLanes, row.spread, distance)});
  return {__shfl_sync(kAllLanes, row.largest, 0), __shfl_sync(kAllLanes, row.others, 0),
          __shfl_sync(kAllLanes, row.spread, 0)};
}

// Returns the number of classes from the lane's first one to the end of the row or of the part.
template <typename T, int chunks>
__device__ inline int lane_classes(int64_t classes, int64_t k0) {
  const int64_t left = classes - k0;
  return static_cast<int>(left < chunks * kChunk<T> ? left : chunks * kChunk<T>) -
         static_cast<int>(threadIdx.x % kWarpSize) * kPack<T>;
}

// Returns element (c, i) of the lane's words, or -inf beyond the end of the row.
template <typename T, int chunks>
__device__ inline Acc<T> logit(const uint4 (&words)[chunks], int c, int i, int left) {
  return c * kChunk<T> + i < left ? element<T>(words[c], i) : -infinity<Acc<T>>();
}

template <typename T, int chunks>
__device__ inline RowStatistics<Acc<T>> lane_statistics(const uint4 (&words)[chunks], int left) {
  using A = Acc<T>;
  A largest = -infinity<A>();
#pragma unroll
  for (int c = 0; c < chunks; ++c)
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) largest = larger(largest, logit<T>(words, c, i, left));
  const bool some = largest > -infinity<A>();
  const A origin = some ? largest : A(0);
  A others = 0, spread = 0, ties = 0;
#pragma unroll
  for (int c = 0; c < chunks; ++c)
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const A x = logit<T>(words, c, i, left);
      const A distance = origin - x, weight = exponential(-distance);
      const bool tie = x == largest;
      ties += tie ? A(1) : A(0);
      others += tie ? A(0) : weight;
      spread += tie || weight == 0 ? A(0) : weight * distance;
    }
  if (some) others += ties - 1;
  return {largest, others, spread};
}

}  // namespace rada_fast
