// The episodic optimiser's vector loops. ../shared/episodic_optimizer.h has the arithmetic; instruction_set.h explains why
// they are compiled several times.
//
// Arrays are contiguous. `source` may be the parameter itself; no two other arrays overlap.
#pragma once

#include "../shared/episodic_optimizer.h"
#include "instruction_set.h"

namespace rada_fast {

struct OptimizerLoops {
  // Converts bfloat16 or float16 to float.
  void (*widen)(const void* gradient, GradientType type, int64_t count, float* out);
  // Rounds float to bfloat16.
  void (*narrow)(const float* values, int64_t count, uint16_t* out);
  // Computes Adam or AdamW in one pass, with the processor's square roots. fresh: the moments are zero and not read.
  void (*adam)(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
               float* first, float* second, float* parameter);
  // These two compute the same with square roots from elsewhere. The first one computes the moments.
  void (*moments)(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
                  float* first, float* second);
  // The second one computes the parameter from the first moment and the root of the second.
  void (*update)(const OptimizerScalars& s, const float* source, const float* first, const float* root, int64_t count,
                 float* parameter);
  // Computes SGD; first is null without momentum.
  void (*descend)(const OptimizerScalars& s, const float* source, const float* gradient, bool fresh, int64_t count,
                  float* first, float* parameter);
  void (*scale)(float factor, const float* source, int64_t count, float* parameter);
};

RADA_LOOPS(OptimizerLoops)

}  // namespace rada_fast
