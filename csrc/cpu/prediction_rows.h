// Helpers of the operators on predictions: the type of the loops for a tensor, and how many rows make a task.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "prediction_loops.h"
#include "scratch.h"

namespace rada_fast {

// A logit takes about a nanosecond, and starting a task some microseconds.
constexpr int64_t kLogitsPerTask = 16384;

inline int64_t rows_per_task(int64_t logits_per_row) {
  return std::max<int64_t>(1, kLogitsPerTask / std::max<int64_t>(1, logits_per_row));
}

// Calls body.template operator()<T>() with the loops' number type for the tensor's dtype.
template <typename Body>
void with_loop_type(const at::Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case at::kFloat: return body.template operator()<float>();
    case at::kDouble: return body.template operator()<double>();
    case at::kBFloat16: return body.template operator()<BF16>();
    case at::kHalf: return body.template operator()<Half>();
    default:
      TORCH_CHECK(false, "logits must be float32, float64, bfloat16 or float16, got ", logits.scalar_type());
  }
}

inline at::ScalarType exact_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace rada_fast
