// This file is compiled without contraction, and a fused product and sum is written as fma(). This is one instruction,
// or a product and a sum with two roundings on a processor without it, as in PyTorch's own vectors.
#include "episodic_optimizer_loops.h"

#include <cstring>

namespace rada_fast::RADA_CAPABILITY {
namespace {

#ifdef __FP_FAST_FMAF
constexpr bool kFused = true;
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
constexpr bool kFused = false;
inline float fma(float a, float b, float c) { return a * b + c; }
#endif

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// This is exact for every float16: the product with 2^112 adjusts the exponent, also that of subnormal numbers.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const float finite = as_float(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13 | 0x7f800000u) : as_bits(finite);
  return as_float(bits | sign);
}

void widen(const void* gradient, GradientType type, int64_t count, float* __restrict out) {
  const auto* __restrict narrow = static_cast<const uint16_t*>(gradient);
  if (type == GradientType::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = as_float(static_cast<uint32_t>(narrow[i]) << 16);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(narrow[i]);
  }
}

// To the nearest, ties to even. A NaN stays one whatever its bits are.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

void narrow(const float* __restrict values, int64_t count, uint16_t* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(values[i]);
}

// This is torch.lerp, which starts from the nearer end.
template <bool kSmall>
inline float lerp(float start, float end, float weight) {
  return kSmall ? fma(weight, end - start, start) : fma(weight - 1.0f, end - start, end);
}

template <bool kCoupled, bool kFresh, bool kSmall>
inline void next_moments(const OptimizerScalars& s, float p, float g, float& m, float& v) {
  if (kCoupled) g = fma(s.weight_decay, p, g);
  m = lerp<kSmall>(kFresh ? 0.0f : m, g, s.first_weight);
  const float kept = kFresh ? 0.0f : v * s.beta2, scaled = s.second_weight * g;
  v = kFused ? fma(scaled, g, kept) : scaled * g + kept;
}

inline float next_parameter(const OptimizerScalars& s, float p, float m, float root) {
  return p * s.decay + s.step_size * m / (root / s.root_divisor + s.eps);
}

template <bool kCoupled, bool kFresh, bool kSmall>
struct Moments {
  static void run(const OptimizerScalars& scalars, const float* source, const float* gradient, int64_t count,
                  float* __restrict first, float* __restrict second, float*) {
    const OptimizerScalars s = scalars;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float m = kFresh ? 0.0f : first[i], v = kFresh ? 0.0f : second[i];
      next_moments<kCoupled, kFresh, kSmall>(s, kCoupled ? source[i] : 0.0f, gradient[i], m, v);
      first[i] = m;
      second[i] = v;
    }
  }
};

template <bool kCoupled, bool kFresh, bool kSmall, bool kLast>
struct AdamStep {
  static void run(const OptimizerScalars& scalars, const float* source, const float* gradient, int64_t count,
                  float* __restrict first, float* __restrict second, float* parameter) {
    const OptimizerScalars s = scalars;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float p = source[i];
      float m = kFresh ? 0.0f : first[i], v = kFresh ? 0.0f : second[i];
      next_moments<kCoupled, kFresh, kSmall>(s, p, gradient[i], m, v);
      if (!kLast) {
        first[i] = m;
        second[i] = v;
      }
      parameter[i] = next_parameter(s, p, m, __builtin_sqrtf(v));
    }
  }
};

template <bool kCoupled, bool kFresh, bool kSmall>
using Adam = AdamStep<kCoupled, kFresh, kSmall, false>;
template <bool kCoupled, bool kFresh, bool kSmall>
using LastAdam = AdamStep<kCoupled, kFresh, kSmall, true>;

template <template <bool, bool, bool> typename Loop, typename... Arguments>
void choose(const OptimizerScalars& s, bool fresh, Arguments... arguments) {
  const bool coupled = s.weight_decay != 0.0f, near = s.first_weight < 0.5f;
  if (coupled && fresh) (near ? Loop<true, true, true>::run : Loop<true, true, false>::run)(s, arguments...);
  if (coupled && !fresh) (near ? Loop<true, false, true>::run : Loop<true, false, false>::run)(s, arguments...);
  if (!coupled && fresh) (near ? Loop<false, true, true>::run : Loop<false, true, false>::run)(s, arguments...);
  if (!coupled && !fresh) (near ? Loop<false, false, true>::run : Loop<false, false, false>::run)(s, arguments...);
}

void adam(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
          float* first, float* second, float* parameter) {
  if (s.last) choose<LastAdam>(s, fresh, source, gradient, count, first, second, parameter);
  else choose<Adam>(s, fresh, source, gradient, count, first, second, parameter);
}

void moments(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
             float* first, float* second) {
  choose<Moments>(s, fresh, source, gradient, count, first, second, static_cast<float*>(nullptr));
}

void update(const OptimizerScalars& scalars, const float* source, const float* first, const float* root, int64_t count,
            float* parameter) {
  const OptimizerScalars s = scalars;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) parameter[i] = next_parameter(s, source[i], first[i], root[i]);
}

template <bool kCoupled, bool kMomentum, bool kFresh>
void descend_of_kind(const OptimizerScalars& s, const float* source, const float* gradient, int64_t count, float* first,
                     float* parameter) {
  const float weight_decay = s.weight_decay, momentum = s.momentum, step_size = s.step_size;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float p = source[i];
    float g = kCoupled ? fma(weight_decay, p, gradient[i]) : gradient[i];
    if (kMomentum) {
      g = kFresh ? g : first[i] * momentum + g;
      first[i] = g;
    }
    parameter[i] = fma(step_size, g, p);
  }
}

void descend(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
             float* first, float* parameter) {
  const bool coupled = s.weight_decay != 0.0f;
  if (first == nullptr)
    (coupled ? descend_of_kind<true, false, false> : descend_of_kind<false, false, false>)(s, source, gradient, count,
                                                                                          first, parameter);
  else if (fresh)
    (coupled ? descend_of_kind<true, true, true> : descend_of_kind<false, true, true>)(s, source, gradient, count,
                                                                                      first, parameter);
  else
    (coupled ? descend_of_kind<true, true, false> : descend_of_kind<false, true, false>)(s, source, gradient, count,
                                                                                        first, parameter);
}

void scale(float factor, const float* source, int64_t count, float* parameter) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) parameter[i] = source[i] * factor;
}

}  // namespace

template <>
const OptimizerLoops& loops() {
  static const OptimizerLoops functions{widen, narrow, adam, moments, update, descend, scale};
  return functions;
}

}  // namespace rada_fast::RADA_CAPABILITY
