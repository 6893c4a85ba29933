// AugMix of views of pictures on CUDA, with Pillow's arithmetic.
#pragma once

#include "multi_view_crops.h"

// Bytes of device memory that rada_fast_augmix works in.
extern "C" int64_t rada_fast_augmix_scratch(int64_t count, int64_t chains, int64_t depth, int32_t size);

// out: (count, 3, size, size) of `type`; frames, mean, std, type: as rada_fast_multi_view_crops; scratch: on the device,
// aligned to 256 bytes. In the host's memory: operations [view][chain][step], 0 none, 1 autocontrast, 2 equalize,
// 3 posterize, 4 solarize, 5 affine; matrices [view][chain][step][6], of posterize and solarize first the bits to keep or
// the least value to invert; weights [view][chains + 2], of the chains, the plain view and the mix of the chains. None of
// it is read after the call returns.
extern "C" cudaError_t rada_fast_augmix(const rada_fast::ViewFrame* frames, int64_t count, int32_t size, int64_t chains,
                                        int64_t depth, const int64_t* operations, const double* matrices,
                                        const float* weights, const float* mean, const float* std, int32_t type,
                                        void* scratch, void* out, cudaStream_t stream);
