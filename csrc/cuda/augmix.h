// AugMix of views of pictures on CUDA, with Pillow's arithmetic.
#pragma once

#include "multi_view_crops.h"

namespace rada_fast {

// A launch has a row of blocks for each view, and a grid has at most 65535 rows. A view's pixels are counted in 32 bits.
constexpr int64_t kMostAugmixViews = 65535, kMostAugmixSize = 16384;

}  // namespace rada_fast

// Returns the number of bytes of scratch memory on the device that rada_fast_augmix needs.
extern "C" int64_t rada_fast_augmix_scratch(int64_t count, int64_t chains, int64_t depth, int32_t size);

// Computes views after AugMix: at most kMostAugmixViews views of at most kMostAugmixSize pixels a side. The numbers of
// views, chains and steps may be 0.
//   frames, mean, std, type   as in rada_fast_multi_view_crops
//   operations                [view][chain][step], numbers of the enumeration Operation in ../shared/view_table.h
//   matrices                  [view][chain][step][6], the matrix of an affine transform; posterize and solarize use
//                             only the first number, the bits to keep or the least value to invert
//   weights                   [view][chains + 2], the weights of the chains, of the plain view, and of the chains' mix
//   scratch                   on the device, aligned to 256 bytes
//   out                       (count, 3, size, size) of `type`, on the device
// operations, matrices and weights are in the host's memory and are not read after the call returns.
extern "C" cudaError_t rada_fast_augmix(const rada_fast::ViewFrame* frames, int64_t count, int32_t size, int64_t chains,
                                        int64_t depth, const int64_t* operations, const double* matrices,
                                        const float* weights, const float* mean, const float* std, int32_t type,
                                        void* scratch, void* out, cudaStream_t stream);
