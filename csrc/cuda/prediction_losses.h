// Launchers of prediction_losses.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rada_fast {

enum PredictionLoss : int { kMeanEntropy, kMarginalEntropy, kCrossEntropy };
constexpr int64_t kMostMarginalRows = 500;

}  // namespace rada_fast

// Returns the number of bytes of workspace that a call of these sizes needs: 0 where an episode is one block, -1 where the
// call is too large for one launch. The workspace is 8-byte aligned and need not be initialised.
extern "C" int64_t rada_fast_prediction_loss_workspace(int kind, int dtype, int64_t episodes, int64_t rows,
                                                       int64_t classes);

// Computes every episode's loss over its predictions and, unless dlogits is null, the gradient of that loss. There is one
// launch; where an episode takes several blocks, its counter is cleared before.
//   logits, dlogits   (episodes, rows, classes), contiguous, of one of the types in prediction_dtype.h
//   labels            (episodes, rows), for kCrossEntropy alone; a loss is NaN where one is outside 0 .. classes - 1
//   losses            (episodes), double for double, otherwise float
// kMarginalEntropy takes at most kMostMarginalRows rows. Without episodes nothing is launched and all pointers may be
// null.
extern "C" cudaError_t rada_fast_prediction_loss(const void* logits, const int64_t* labels, int kind, int dtype,
                                                 int64_t episodes, int64_t rows, int64_t classes, double smoothing,
                                                 void* losses, void* dlogits, void* workspace, cudaStream_t stream);
