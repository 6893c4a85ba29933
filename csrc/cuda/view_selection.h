// Launchers of view_selection.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Computes the entropies of all predictions, and the views with the `count` lowest ones of every episode, in one launch.
//   logits      (episodes, views, classes), contiguous, of one of the types in prediction_dtype.h
//   indices     (episodes, count), ascending in entropy, then in the index; NaN comes last
//   entropies   (episodes, views), double for double, otherwise float
extern "C" cudaError_t rada_fast_select_views(const void* logits, int dtype, int64_t episodes, int64_t views,
                                              int64_t classes, int64_t count, int64_t* indices, void* entropies,
                                              cudaStream_t stream);
