// Loops over the logits of predictions: entropies, losses, their gradients. instruction_set.h explains why they are
// compiled several times.
//
// The sums over a prediction leave out one of its largest logits. With d = max - x for a logit x, and r = sum exp(-d) over
// all the other logits,
//
//   ln sum exp(x - max) = ln(1 + r),     entropy = ln(1 + r) + sum exp(-d) d / (1 + r).
//
// No term cancels another, so the small entropy of a confident prediction keeps all its digits. Every row is first
// copied to `scratch`, so that equal rows are summed in the same order wherever they are in memory. A row with a NaN,
// with +inf or with nothing but -inf gives NaN; otherwise a logit of -inf gives its class the probability 0.
#pragma once

#include "instruction_set.h"
#include "number_types.h"

namespace rada_fast {

template <typename T>
struct PredictionLoops {
  using A = Acc<T>;

  // Return the number of accumulators of scratch, aligned to 64 bytes, for one row and for a marginal entropy of `rows`
  // rows.
  int64_t (*scratch_row)(int64_t classes);
  int64_t (*scratch_marginal)(int64_t rows, int64_t classes);

  // Returns the entropy of softmax(logits). gradient receives factor times its gradient; it may be null, here and below.
  A (*entropy)(const T* logits, int64_t classes, A factor, A* scratch, T* gradient);
  // Returns the cross-entropy with PyTorch's label smoothing; a label outside [0, classes) gives NaN.
  A (*cross_entropy)(const T* logits, int64_t classes, int64_t label, A smoothing, A factor, A* scratch, T* gradient);
  // Returns the entropy of the mean of `rows` predictions; gradient receives its gradient.
  A (*marginal)(const T* logits, int64_t rows, int64_t classes, A* scratch, T* gradient);
};

RADA_LOOPS(PredictionLoops<float>)
RADA_LOOPS(PredictionLoops<double>)
RADA_LOOPS(PredictionLoops<BF16>)
RADA_LOOPS(PredictionLoops<Half>)

}  // namespace rada_fast
