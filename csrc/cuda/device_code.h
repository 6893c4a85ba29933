// Finds out which of the compiled copies of the kernels a device runs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// architecture receives 10 times the compute capability of the code that the driver chose for the stream's device: 800 for
// sm_80.
extern "C" cudaError_t rada_fast_device_architecture(int32_t* architecture, cudaStream_t stream);
