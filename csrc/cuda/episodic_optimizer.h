// The episodic optimiser's launcher; ../shared/episodic_optimizer.h has the arithmetic and the arguments.
#pragma once

#include <cuda_runtime_api.h>

#include "../shared/episodic_optimizer.h"

// One launch for every 56 tensors. `tensors` and `scalars` lie in host memory and travel with the launch; what they
// point to lies on the stream's device. Steps are numbered by the host: a captured graph keeps its numbers.
extern "C" cudaError_t rada_fast_episodic_optimizer(const rada_fast::OptimizerTensor* tensors, int64_t count,
                                                    const rada_fast::OptimizerScalars* scalars, cudaStream_t stream);
