// Number types of the CPU's loops, without PyTorch's classes: those must not enter code that is compiled per instruction
// set (see instruction_set.h).
#pragma once

#include <cstdint>

#include "../shared/accumulate_type.h"

namespace rada_fast {

struct BF16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
// bfloat16 in memory only, for processors that cannot multiply it: it is widened to float for every matrix product.
struct WideBF16 {
  uint16_t bits;
};

// The type that a matrix product multiplies: the stored type itself, or float for widened bfloat16.
template <typename T>
struct FactorType {
  using type = T;
};
template <>
struct FactorType<WideBF16> {
  using type = float;
};
template <typename T>
using Factor = typename FactorType<T>::type;

// X(T) for every type that the adapter stores, and for every type that its products multiply.
#define RADA_STORED_TYPES(X) X(float) X(double) X(BF16) X(WideBF16)
#define RADA_FACTOR_TYPES(X) X(float) X(double) X(BF16)

}  // namespace rada_fast
