// Functions of one value for the vector loops: conversions, e^x, 2^x, ln x. Only *_loops.cpp include this file. Everything here
// has internal linkage, for the reason that instruction_set.h gives.
#pragma once

#include <cmath>
#include <cstring>

#include "number_types.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float load(WideBF16 x) { return load(BF16{x.bits}); }

inline float load(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;  // the difference between the exponents' biases; this is exact for denormals too
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = sign | (magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits);
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even: the upper 16 bits are the bfloat16. A NaN stays one because its quiet bit is set.
inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t up = bits + 0x7fff + ((bits >> 16) & 1);
  return x != x ? (bits | 0x400000u) : up;
}
inline void put(float& out, float x) { out = x; }
inline void put(double& out, double x) { out = x; }
inline void put(BF16& out, float x) { out.bits = static_cast<uint16_t>(rounded(x) >> 16); }
inline void put(WideBF16& out, float x) { out.bits = static_cast<uint16_t>(rounded(x) >> 16); }

// Rounds to nearest even; too large values become infinite.
inline void put(Half& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  // Below the least normal float16, the addition itself rounds to the right place.
  float small;
  std::memcpy(&small, &bits, 4);
  small += 0.5f;
  uint32_t denormal;
  std::memcpy(&denormal, &small, 4);
  denormal -= 0x3f000000u;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13;
  const uint32_t huge = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = bits < 113u << 23 ? denormal : normal;
  out.bits = static_cast<uint16_t>(sign | (bits >= 143u << 23 ? huge : finite));
}

// Returns 2^n, or 0 for n = -127, of a number whose last bits are those of n, -127 to 127.
inline float power_of_last_bits(float shifted) {
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// e^x of x <= 0, with a relative error below 2 ulp; 0 below -87.7. A NaN stays one. With x = n ln2 + r and |r| <= ln2 / 2,
// e^r is 1 + r + r^2 q(r), where q is the polynomial of degree 4 with the least relative error of the sum, 3e-9.
inline float exponential_of(float x) {
  const float clamped = x < -88.03f ? -88.03f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // the last bits are those of n, -127 to 0
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3814599e-3f;
  p = p * r + 8.3687166e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * power_of_last_bits(shifted);
}
inline double exponential_of(double x) { return std::exp(x); }

// 2^x of x <= 0, with a relative error below 1 ulp; 0 below -126.5. A NaN stays one. With x = n + r and |r| <= 1/2, 2^r is
// 1 + r q(r), where q is the polynomial of degree 5 with the least relative error of the sum, 2e-9.
inline float power_of_two(float x) {
  const float clamped = x < -127.0f ? -127.0f : x;
  const float shifted = clamped + 12582912.0f;  // the last bits are those of n, -127 to 0
  const float r = clamped - (shifted - 12582912.0f);
  float p = 1.53533620e-4f;
  p = p * r + 1.33988739e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return p * power_of_last_bits(shifted);
}
inline double power_of_two(double x) { return std::exp2(x); }

// ln x with a relative error below 2 ulp for x > 0, denormals included; -infinity at 0. Cephes' polynomial.
inline float logarithm_of(float x) {
  const bool tiny = x < 0x1p-126f;
  const float scaled = tiny ? x * 0x1p24f : x;
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  // The mantissa in [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = bits - 0x3f3504f3u;
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const uint32_t mantissa_bits = (shifted & 0x7fffffu) + 0x3f3504f3u;
  float mantissa;
  std::memcpy(&mantissa, &mantissa_bits, 4);
  const float f = mantissa - 1.0f, n = static_cast<float>(exponent - (tiny ? 24 : 0));
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float tail = p * f * square + n * -2.12194440e-4f - 0.5f * square;
  const float value = (f + tail) + n * 0.693359375f;
  return x > 0 && x < HUGE_VALF ? value : (x == 0 ? -HUGE_VALF : x);
}
inline double logarithm_of(double x) { return std::log(x); }

}  // namespace
}  // namespace rada_fast::RADA_CAPABILITY
