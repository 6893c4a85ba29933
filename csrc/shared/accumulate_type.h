// The type that a sum of stored values is kept in: double for double, float for everything else.
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
