// The episodic optimiser's launcher; ../shared/episodic_optimizer.h has the arithmetic and the arguments.
#pragma once

#include <cuda_runtime_api.h>

#include "../shared/episodic_optimizer.h"

// Makes one launch for every 56 tensors. `tensors` and `scalars` are in host memory and are passed with the launch; the
// tensors' pointers are to memory of the stream's device. The host numbers the steps, so a captured graph repeats the step
// with which it was captured.
extern "C" cudaError_t rada_fast_episodic_optimizer(const rada_fast::OptimizerTensor* tensors, int64_t count,
                                                    const rada_fast::OptimizerScalars* scalars, cudaStream_t stream);
