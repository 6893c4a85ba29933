// The episodic optimiser's arguments on either device, and what both make of them; no tensor type of its own.
//
// The arithmetic is that of torch.optim's single-tensor Adam, AdamW and SGD on a processor with fused multiply-adds:
//   adamw: p = p (1 - lr wd)          adam, sgd: g = fma(wd, p, g)
//   m = lerp(m, g, 1 - beta1)         v = fma((1 - beta2) g, g, v beta2)
//   p = p + (-lr / (1 - beta1^t) m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   sgd: m = m momentum + g (m = g at first); p = fma(-lr, m or g, p)
// Scalars are made in double and rounded once, as PyTorch does with Python's numbers.
#pragma once

#include <cstdint>

namespace rada_fast {

enum class OptimizerRule : int32_t { adamw, adam, sgd };
enum class GradientType : int32_t { none, float32, bfloat16, float16 };  // none: exactly zero

struct OptimizerScalars {
  OptimizerRule rule;
  float decay;          // factor of the parameter: 1 - lr wd for adamw, else 1
  float weight_decay;   // added to the gradient: adam and sgd
  float first_weight;   // 1 - beta1
  float beta2;
  float second_weight;  // 1 - beta2
  float root_divisor;   // sqrt(1 - beta2^t)
  float eps;
  float step_size;      // -lr / (1 - beta1^t); sgd: -lr
  float momentum;       // sgd; 0: no moment
};

// One tensor: `rows` copies of `row` elements, one after the other; every array but the source has them all.
struct OptimizerTensor {
  float* parameter;
  const float* source;   // where the parameter is read: itself, or one row that all copies start from
  float* first;          // null: zero and stays so
  float* second;
  const void* gradient;  // null where type is none
  int64_t row, rows;
  GradientType type;
  int32_t fresh;         // the moments are zero and are not read
};

}  // namespace rada_fast
