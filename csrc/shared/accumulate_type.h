// The type in which sums of stored values are kept: double for double, float for every other type.
#pragma once

namespace rada_fast {

template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulateType<T>::type;

}  // namespace rada_fast
