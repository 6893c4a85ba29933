// A block owns a tile of 32 x 32 pixels of a view. It reads the pixels of the picture on which the tile depends and writes
// each output once. Pixels on which several tiles depend are read several times. See view_resize.cuh.
#include "multi_view_crops.h"

#include "view_resize.cuh"

namespace rada_fast {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    multi_view_crops(const __grid_constant__ Frames frames, Channels channels, int32_t size, T* out) {
  __shared__ ResizeTile tile;
  __shared__ float normalised[3][256];
  for (int channel = 0; channel < 3; ++channel)
    normalised[channel][threadIdx.x] = normalised_value(threadIdx.x, channels, channel);
  uint8_t values[kRows][3];
  resize_tile(frames.frame[blockIdx.z], size, tile, values);
  const int32_t column = thread_column(), first = thread_row();
  if (column >= size) return;
#pragma unroll
  for (int channel = 0; channel < 3; ++channel)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (first + i < size)
        put(out + ((static_cast<int64_t>(blockIdx.z) * 3 + channel) * size + first + i) * size + column,
            normalised[channel][values[i][channel]]);
}

template <typename T>
cudaError_t launch(const ViewFrame* frames, int64_t count, int32_t size, const Channels& channels, T* out,
                   cudaStream_t stream) {
  return launch_by_frames(frames, count, size, [&](dim3 grid, const Frames& part, int64_t begin) {
    multi_view_crops<T><<<grid, kThreads, 0, stream>>>(part, channels, size, out + begin * 3 * size * size);
  });
}

}  // namespace
}  // namespace rada_fast

extern "C" cudaError_t rada_fast_multi_view_crops(const rada_fast::ViewFrame* frames, int64_t count, int32_t size,
                                                  const float* mean, const float* std, int32_t type, void* out,
                                                  cudaStream_t stream) {
  using namespace rada_fast;
  Channels channels;
  std::copy(mean, mean + 3, channels.mean);
  std::copy(std, std + 3, channels.std);
  switch (type) {
    case kViewFloat: return launch(frames, count, size, channels, static_cast<float*>(out), stream);
    case kViewBfloat16: return launch(frames, count, size, channels, static_cast<__nv_bfloat16*>(out), stream);
    case kViewHalf: return launch(frames, count, size, channels, static_cast<__half*>(out), stream);
    default: return cudaErrorInvalidValue;
  }
}
