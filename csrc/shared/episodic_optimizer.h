// The episodic optimiser's arithmetic, and the arguments of its kernels on either device. No tensor type is used here.
//
// The arithmetic is that of torch.optim's single-tensor Adam, AdamW and SGD on a processor with fused multiply-adds. For a
// parameter p with gradient g, moments m and v, step t, learning rate lr and weight decay wd:
//   adamw: p = p (1 - lr wd)          adam, sgd: g = fma(wd, p, g)
//   m = lerp(m, g, 1 - beta1)         v = fma((1 - beta2) g, g, v beta2)
//   p = p + (-lr / (1 - beta1^t) m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   sgd: m = m momentum + g (m = g at first); p = fma(-lr, m or g, p)
// Scalars are computed in double and rounded once, as PyTorch does with Python's numbers.
#pragma once

#include <cstdint>

namespace rada_fast {

enum class OptimizerRule : int32_t { adamw, adam, sgd };
enum class GradientType : int32_t { none, float32, bfloat16, float16 };  // none: exactly zero

struct OptimizerScalars {
  OptimizerRule rule;
  float decay;          // the factor of the parameter: 1 - lr wd for adamw, else 1
  float weight_decay;   // for adam and sgd, where this times the parameter is added to the gradient; else 0
  float first_weight;   // 1 - beta1
  float beta2;
  float second_weight;  // 1 - beta2
  float root_divisor;   // sqrt(1 - beta2^t)
  float eps;
  float step_size;      // -lr / (1 - beta1^t); sgd: -lr
  float momentum;       // for sgd; 0 keeps no moment
  int32_t last;         // whether moments, and parameters with a copy, are not read again and need not be written
};

// One tensor: `rows` copies of `row` elements, one after the other. Every array holds all copies, but the source may be
// the single row that they all start from.
struct OptimizerTensor {
  float* parameter;
  const float* source;   // the values that are read: the parameter itself, or one row
  float* first;          // the first moment; null where it is zero and stays zero
  float* second;
  const void* gradient;  // null where type is none
  uint16_t* copy;        // the new values in bfloat16, for products; null where no copy is wanted
  int64_t row, rows;
  GradientType type;
  int32_t fresh;         // whether the moments are zero; they are then not read
};

}  // namespace rada_fast
