// See episodic_optimizer_loops.h. RADA_CAPABILITY names the namespace this copy is compiled into.
//
// Compiled without contraction: what is fused is written as fma(), which is one instruction or, on a processor that has
// none, two roundings, as in PyTorch's own vectors.
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

// Exact for every float16: the product with 2^112 moves the exponent, of subnormal numbers too.
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

// torch.lerp: from the nearer end.
template <bool kSmall>
inline float lerp(float start, float end, float weight) {
  return kSmall ? fma(weight, end - start, start) : fma(weight - 1.0f, end - start, end);
}

template <bool kCoupled, bool kFresh, bool kSmall>
void moments_of_kind(const OptimizerScalars& s, const float* source, const float* gradient, int64_t count,
                     float* __restrict first, float* __restrict second) {
  const float weight_decay = s.weight_decay, w1 = s.first_weight, beta2 = s.beta2, w2 = s.second_weight;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float g = kCoupled ? fma(weight_decay, source[i], gradient[i]) : gradient[i];
    first[i] = lerp<kSmall>(kFresh ? 0.0f : first[i], g, w1);
    const float kept = kFresh ? 0.0f : second[i] * beta2, scaled = w2 * g;
    second[i] = kFused ? fma(scaled, g, kept) : scaled * g + kept;
  }
}

template <bool kCoupled, bool kFresh>
void moments_of_rule(const OptimizerScalars& s, const float* source, const float* gradient, int64_t count, float* first,
                     float* second) {
  const bool near = s.first_weight < 0.5f;
  (near ? moments_of_kind<kCoupled, kFresh, true> : moments_of_kind<kCoupled, kFresh, false>)(
      s, source, gradient, count, first, second);
}

void moments(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
             float* first, float* second) {
  if (s.weight_decay != 0.0f)
    (fresh ? moments_of_rule<true, true> : moments_of_rule<true, false>)(s, source, gradient, count, first, second);
  else
    (fresh ? moments_of_rule<false, true> : moments_of_rule<false, false>)(s, source, gradient, count, first, second);
}

void update(const OptimizerScalars& s, const float* source, const float* first, const float* root, int64_t count,
            float* parameter) {
  const float decay = s.decay, divisor = s.root_divisor, eps = s.eps, step_size = s.step_size;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    parameter[i] = source[i] * decay + step_size * first[i] / (root[i] / divisor + eps);
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

const OptimizerLoops& optimizer_loops() {
  static const OptimizerLoops loops{widen, moments, update, descend, scale};
  return loops;
}

}  // namespace rada_fast::RADA_CAPABILITY
