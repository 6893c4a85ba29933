// Cuts views of pictures on CUDA: boxes are resized as by Pillow, mirrored and normalised.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rada_fast {

enum ViewFlags : int32_t { kFlip = 1, kBicubic = 2, kVerticalFirst = 4 };

// One view: the first pixel of its box; the distances between rows, pixels and channels in bytes; the size of the box; the
// size to which it is resized; the view's position in the resized box; ViewFlags.
struct ViewFrame {
  const uint8_t* pixels;
  int64_t row_stride, column_stride, channel_stride;
  int32_t height, width, resized_height, resized_width, window_top, window_left, flags, unused;
};
static_assert(sizeof(ViewFrame) == 64, "tests write these as 64 bytes");

// This many frames fit into a kernel's arguments, 4 KiB. Passed in this way they need no copy, and a CUDA graph keeps
// them.
constexpr int kMostFrames = 56;

enum ViewType : int { kViewFloat = 0, kViewBfloat16 = 2, kViewHalf = 3 };

}  // namespace rada_fast

// out: (count, 3, size, size) of `type`. frames (`count` of them), mean and std (3 numbers each) are in the host's memory.
// out = (resized / 255 - mean) / std, computed in float32 and rounded to the type.
extern "C" cudaError_t rada_fast_multi_view_crops(const rada_fast::ViewFrame* frames, int64_t count, int32_t size,
                                                  const float* mean, const float* std, int32_t type, void* out,
                                                  cudaStream_t stream);
