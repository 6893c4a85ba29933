// Loops over the logits of predictions: entropies, losses, their gradients. See instruction_set.h for the copies.
//
// The sums over a prediction leave out one of its largest logits. With d = max - x, and r = sum exp(-d) over all the
// others,
//
//   ln sum exp(x - max) = ln(1 + r),     entropy = ln(1 + r) + sum exp(-d) d / (1 + r),
//
// so that no term cancels another, and the small entropy of a confident prediction keeps all its digits. Every row is
// first copied to `scratch`, so that equal rows are summed in the same order wherever they are in memory. A row with a NaN,
// with +inf or with nothing but -inf gives NaN; otherwise a logit of -inf is a class of probability 0.
#pragma once

#include "instruction_set.h"
#include "number_types.h"

namespace rada_fast {

template <typename T>
struct PredictionLoops {
  using A = Acc<T>;

  // How many accumulators of scratch, aligned to 64 bytes, one row needs, and `rows` rows of a marginal entropy.
  int64_t (*scratch_row)(int64_t classes);
  int64_t (*scratch_marginal)(int64_t rows, int64_t classes);

  // Entropy of softmax(logits). gradient receives factor times the entropy's gradient; it may be null, here and below.
  A (*entropy)(const T* logits, int64_t classes, A factor, A* scratch, T* gradient);
  // Cross-entropy with PyTorch's label smoothing; a label outside [0, classes) gives NaN.
  A (*cross_entropy)(const T* logits, int64_t classes, int64_t label, A smoothing, A factor, A* scratch, T* gradient);
  // Entropy of the mean of `rows` predictions, and its gradient.
  A (*marginal)(const T* logits, int64_t rows, int64_t classes, A* scratch, T* gradient);
};

RADA_LOOPS(PredictionLoops<float>)
RADA_LOOPS(PredictionLoops<double>)
RADA_LOOPS(PredictionLoops<BF16>)
RADA_LOOPS(PredictionLoops<Half>)

}  // namespace rada_fast
