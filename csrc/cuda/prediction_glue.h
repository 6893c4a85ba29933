// Helpers that connect the kernels on predictions to PyTorch: the launchers' number of a dtype, and the dtype of the
// results.
#pragma once

#include "prediction_dtype.h"
#include "torch_glue.h"

namespace rada_fast {

inline int prediction_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "logits must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType exact_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace rada_fast
