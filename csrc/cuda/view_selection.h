// Launchers of view_selection.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Entropies of the predictions of `episodes` times `views` rows of logits, and every episode's `count` lowest ones:
// logits (episodes, views, classes), contiguous, of one of prediction_dtype.h's types; indices (episodes, count), ascending
// in entropy, ties by index, NaN last; entropies (episodes, views), double for double, else float. One launch.
extern "C" cudaError_t rada_fast_select_views(const void* logits, int dtype, int64_t episodes, int64_t views,
                                              int64_t classes, int64_t count, int64_t* indices, void* entropies,
                                              cudaStream_t stream);
