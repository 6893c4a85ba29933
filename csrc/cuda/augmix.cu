// There are four kinds of launches: the plan is sent to the device as kernels' arguments; the views are resized into 8-bit
// pixels; a block applies one chain to a view; the chains are mixed. A pixel of a view has four bytes: red, green,
// blue, 0.
//
// Operations on values only change a table of 3 x 256 bytes in shared memory. Only affine transforms and the mix read
// pixels, and they apply the table to the pixels that they read. Histograms are counted in shared memory: sums of integers
// do not depend on their order.
#include "augmix.h"

#include <algorithm>

#include "../shared/view_table.h"
#include "view_resize.cuh"

namespace rada_fast {
namespace {

constexpr int kChainThreads = 512, kMixThreads = 256, kValues = 3 * 256;

// The arrays in the scratch memory.
struct Workspace {
  int64_t chains, depth;
  int32_t size;
  int64_t* operations;
  double* matrices;
  float* weights;
  uint32_t* plain;    // [view][size][size]
  uint32_t* moved;    // [view][chain][2][size][size]
  float* values;      // [view][chains + 1][3][256]: a byte's contribution to the mix; the last is the plain view's
  int32_t* places;    // [view][chain]: where the chain's pixels are, 0 for the plain view, 1 and 2 for the buffers
};

// Sets the arrays' addresses and returns the number of bytes used; call it with a null base to learn that number.
int64_t lay_out(Workspace& w, char* base, int64_t count, int64_t chains, int64_t depth, int32_t size) {
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t elements) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += (elements * static_cast<int64_t>(sizeof(*pointer)) + 255) / 256 * 256;
  };
  const int64_t pixels = static_cast<int64_t>(size) * size;
  w.chains = chains;
  w.depth = depth;
  w.size = size;
  take(w.operations, count * chains * depth);
  take(w.matrices, count * chains * depth * 6);
  take(w.weights, count * (chains + 2));
  take(w.plain, count * pixels);
  take(w.moved, count * chains * 2 * pixels);
  take(w.values, count * (chains + 1) * kValues);
  take(w.places, count * chains);
  return used;
}

struct Words {
  uint32_t word[960];
};
static_assert(sizeof(Words) + 64 <= 4096, "a kernel's arguments");

__global__ void __launch_bounds__(256) store_words(const __grid_constant__ Words words, int32_t count, uint32_t* out) {
  for (int32_t i = threadIdx.x; i < count; i += 256) out[i] = words.word[i];
}

cudaError_t upload(const void* from, int64_t bytes, void* to, cudaStream_t stream) {
  const auto* source = static_cast<const uint32_t*>(from);
  const int64_t count = bytes / 4;
  for (int64_t begin = 0; begin < count; begin += 960) {
    const int32_t part = static_cast<int32_t>(std::min<int64_t>(960, count - begin));
    Words words{};
    std::copy_n(source + begin, part, words.word);
    store_words<<<1, 256, 0, stream>>>(words, part, static_cast<uint32_t*>(to) + begin);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

__global__ void __launch_bounds__(kThreads)
    resize_pixels(const __grid_constant__ Frames frames, int32_t size, uint32_t* out) {
  __shared__ ResizeTile tile;
  uint8_t values[kRows][3];
  resize_tile(frames.frame[blockIdx.z], size, tile, values);
  const int32_t column = thread_column(), first = thread_row();
  if (column >= size) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (first + i < size)
      out[(static_cast<int64_t>(blockIdx.z) * size + first + i) * size + column] =
          values[i][0] | values[i][1] << 8 | values[i][2] << 16;
}

struct Chain {
  uint32_t counts[3][256];
  uint8_t table[3][256], found[3][256];
};

__device__ inline uint32_t looked_up(const Chain& chain, uint32_t pixel) {
  return chain.table[0][pixel & 255] | chain.table[1][pixel >> 8 & 255] << 8 | chain.table[2][pixel >> 16 & 255] << 16;
}

__device__ inline void count_values(Chain& chain, const uint32_t* image, int32_t pixels) {
  for (int i = threadIdx.x; i < kValues; i += kChainThreads) chain.counts[i / 256][i % 256] = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < pixels; i += kChainThreads) {
    const uint32_t pixel = looked_up(chain, image[i]);
    atomicAdd(&chain.counts[0][pixel & 255], 1u);
    atomicAdd(&chain.counts[1][pixel >> 8 & 255], 1u);
    atomicAdd(&chain.counts[2][pixel >> 16 & 255], 1u);
  }
  __syncthreads();
}

// A warp handles one channel and a lane eight of its values; `flatten` works in the same way.
__device__ inline void stretch(Chain& chain, int channel, int lane) {
  const uint32_t* counts = chain.counts[channel];
  int low = 255, high = 0;
  for (int i = 0; i < 8; ++i)
    if (counts[8 * lane + i] != 0) {
      low = min(low, 8 * lane + i);
      high = max(high, 8 * lane + i);
    }
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  const double scale = high > low ? __ddiv_rn(255.0, static_cast<double>(high - low)) : 1.0;
  const double offset = high > low ? __dmul_rn(static_cast<double>(-low), scale) : 0.0;
  for (int value = lane; value < 256; value += 32) {
    const int found = static_cast<int>(__dadd_rn(__dmul_rn(static_cast<double>(value), scale), offset));
    chain.found[channel][value] = static_cast<uint8_t>(min(max(found, 0), 255));
  }
}

__device__ inline void flatten(Chain& chain, int channel, int lane) {
  const uint32_t* counts = chain.counts[channel];
  uint32_t own = 0;
  int highest = 0, different = 0;
  for (int i = 0; i < 8; ++i)
    if (const uint32_t count = counts[8 * lane + i]; count != 0) {
      own += count;
      highest = 8 * lane + i;
      ++different;
    }
  highest = __reduce_max_sync(~0u, highest);
  different = __reduce_add_sync(~0u, different);
  const uint32_t total = __reduce_add_sync(~0u, own);
  const uint32_t step = different <= 1 ? 0 : (total - counts[highest]) / 255;
  uint32_t before = own;  // becomes the sum of the lanes below
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, before, distance);
    if (lane >= distance) before += below;
  }
  uint32_t sum = before - own + step / 2;
  for (int i = 0; i < 8; ++i) {
    const int value = 8 * lane + i;
    // The last values may be 256, which Pillow clips.
    chain.found[channel][value] = static_cast<uint8_t>(step == 0 ? value : min(sum / step, 255u));
    sum += counts[value];
  }
}

__device__ inline double channel_value(uint32_t pixel, int shift) {
  return static_cast<double>(static_cast<int>(pixel >> shift & 255));
}

__device__ inline double between(double from, double to, double share) {
  return __dadd_rn(from, __dmul_rn(__dsub_rn(to, from), share));
}

// Computes Pillow's bilinear affine transform, and applies the table to every pixel that it reads.
__device__ inline void transform(const Chain& chain, const uint32_t* image, const double* matrix, int32_t size,
                                 uint32_t* out) {
  const double a = matrix[0], b = matrix[1], c = matrix[2], d = matrix[3], e = matrix[4], f = matrix[5];
  const double extent = size;
  for (int32_t i = threadIdx.x; i < size * size; i += kChainThreads) {
    const double x = i % size + 0.5, y = i / size + 0.5;
    const double from_x = __dadd_rn(__dadd_rn(__dmul_rn(a, x), __dmul_rn(b, y)), c);
    const double from_y = __dadd_rn(__dadd_rn(__dmul_rn(d, x), __dmul_rn(e, y)), f);
    uint32_t found = 0;
    if (from_x >= 0.0 && from_x < extent && from_y >= 0.0 && from_y < extent) {
      const double left = floor(from_x - 0.5), top = floor(from_y - 0.5);
      const double right = __dsub_rn(from_x - 0.5, left), below = __dsub_rn(from_y - 0.5, top);
      const int32_t x0 = max(static_cast<int32_t>(left), 0), x1 = min(static_cast<int32_t>(left) + 1, size - 1);
      const uint32_t* upper = image + max(static_cast<int32_t>(top), 0) * size;
      const uint32_t* lower = image + min(static_cast<int32_t>(top) + 1, size - 1) * size;
      const uint32_t corners[4] = {looked_up(chain, upper[x0]), looked_up(chain, upper[x1]),
                                   looked_up(chain, lower[x0]), looked_up(chain, lower[x1])};
#pragma unroll
      for (int shift = 0; shift < 24; shift += 8) {
        const double above = between(channel_value(corners[0], shift), channel_value(corners[1], shift), right);
        const double under = between(channel_value(corners[2], shift), channel_value(corners[3], shift), right);
        found |= static_cast<uint32_t>(static_cast<int>(between(above, under, below)) & 255) << shift;
      }
    }
    out[i] = found;
  }
}

// There is a block for every chain of a view, and one for the plain view.
__global__ void __launch_bounds__(kChainThreads) run_chains(Workspace w, Channels channels) {
  __shared__ Chain chain;
  const int64_t view = blockIdx.y, index = blockIdx.x;
  const float* weights = w.weights + view * (w.chains + 2);
  float* const values = w.values + (view * (w.chains + 1) + index) * kValues;
  if (index == w.chains) {
    // The plain view's values, which are needed without any chain too.
    for (int i = threadIdx.x; i < kValues; i += kChainThreads)
      values[i] = __fmul_rn(weights[index], normalised_value(i % 256, channels, i / 256));
    return;
  }
  const int32_t pixels = w.size * w.size;
  const uint32_t* image = w.plain + view * pixels;
  uint32_t* const buffers = w.moved + (view * w.chains + index) * 2 * pixels;
  int32_t place = 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kValues; i += kChainThreads) chain.table[i / 256][i % 256] = static_cast<uint8_t>(i);
  __syncthreads();
  for (int64_t step = 0; step < w.depth; ++step) {
    const int64_t at = (view * w.chains + index) * w.depth + step;
    const Operation operation = static_cast<Operation>(w.operations[at]);
    const double* matrix = w.matrices + 6 * at;
    if (operation == Operation::none) continue;
    if (operation == Operation::affine) {
      place = place == 1 ? 2 : 1;
      uint32_t* const out = buffers + static_cast<int64_t>(place - 1) * pixels;
      transform(chain, image, matrix, w.size, out);
      image = out;
      __syncthreads();
      for (int i = threadIdx.x; i < kValues; i += kChainThreads)
        chain.table[i / 256][i % 256] = static_cast<uint8_t>(i);
      __syncthreads();
      continue;
    }
    if (operation == Operation::autocontrast || operation == Operation::equalize) {
      count_values(chain, image, pixels);
      if (warp < 3) operation == Operation::autocontrast ? stretch(chain, warp, lane) : flatten(chain, warp, lane);
    } else {
      const int amount = static_cast<int>(matrix[0]);
      for (int i = threadIdx.x; i < kValues; i += kChainThreads) {
        const int value = i % 256;
        const int found = operation == Operation::posterize ? value & ~((1 << (8 - amount)) - 1)
                                                            : (value < matrix[0] ? value : 255 - value);
        chain.found[i / 256][value] = static_cast<uint8_t>(found);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kValues; i += kChainThreads)
      chain.table[i / 256][i % 256] = chain.found[i / 256][chain.table[i / 256][i % 256]];
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kValues; i += kChainThreads)
    values[i] = __fmul_rn(weights[index], normalised_value(chain.table[i / 256][i % 256], channels, i / 256));
  if (threadIdx.x == 0) w.places[view * w.chains + index] = place;
}

template <typename T>
__global__ void __launch_bounds__(kMixThreads) mix(Workspace w, T* out) {
  const int64_t view = blockIdx.y;
  const int32_t pixels = w.size * w.size, i = blockIdx.x * kMixThreads + threadIdx.x;
  if (i >= pixels) return;
  const float* weights = w.weights + view * (w.chains + 2);
  const float rest = weights[w.chains + 1];
  // Where the mix has weight 0, the result is the plain view, since the mix is finite.
  const int64_t used = weights[w.chains] == 1.0f && rest == 0.0f ? 0 : w.chains;
  const float* values = w.values + view * (w.chains + 1) * kValues;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int64_t chain = 0; chain < used; ++chain) {
    const int32_t place = w.places[view * w.chains + chain];
    const uint32_t pixel = place == 0
                               ? w.plain[view * pixels + i]
                               : w.moved[((view * w.chains + chain) * 2 + place - 1) * static_cast<int64_t>(pixels) + i];
#pragma unroll
    for (int channel = 0; channel < 3; ++channel)
      sums[channel] =
          __fadd_rn(sums[channel], values[chain * kValues + channel * 256 + (pixel >> (8 * channel) & 255)]);
  }
  const uint32_t pixel = w.plain[view * pixels + i];
#pragma unroll
  for (int channel = 0; channel < 3; ++channel)
    put(out + (view * 3 + channel) * pixels + i,
        __fadd_rn(values[w.chains * kValues + channel * 256 + (pixel >> (8 * channel) & 255)],
                  __fmul_rn(rest, sums[channel])));
}

cudaError_t resize(const ViewFrame* frames, int64_t count, int32_t size, uint32_t* out, cudaStream_t stream) {
  return launch_by_frames(frames, count, size, [&](dim3 grid, const Frames& part, int64_t begin) {
    resize_pixels<<<grid, kThreads, 0, stream>>>(part, size, out + begin * size * size);
  });
}

template <typename T>
cudaError_t launch_mix(const Workspace& w, int64_t count, T* out, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((w.size * w.size + kMixThreads - 1) / kMixThreads);
  mix<T><<<dim3(blocks, static_cast<unsigned>(count)), kMixThreads, 0, stream>>>(w, out);
  return cudaGetLastError();
}

}  // namespace
}  // namespace rada_fast

extern "C" int64_t rada_fast_augmix_scratch(int64_t count, int64_t chains, int64_t depth, int32_t size) {
  rada_fast::Workspace w;
  return rada_fast::lay_out(w, nullptr, count, chains, depth, size);
}

extern "C" cudaError_t rada_fast_augmix(const rada_fast::ViewFrame* frames, int64_t count, int32_t size, int64_t chains,
                                        int64_t depth, const int64_t* operations, const double* matrices,
                                        const float* weights, const float* mean, const float* std, int32_t type,
                                        void* scratch, void* out, cudaStream_t stream) {
  using namespace rada_fast;
  if (count == 0) return cudaSuccess;
  if (count > kMostAugmixViews || size > kMostAugmixSize) return cudaErrorInvalidValue;
  Workspace w;
  lay_out(w, static_cast<char*>(scratch), count, chains, depth, size);
  Channels channels;
  std::copy(mean, mean + 3, channels.mean);
  std::copy(std, std + 3, channels.std);
  const int64_t steps = count * chains * depth;
  cudaError_t status = upload(operations, steps * 8, w.operations, stream);
  if (status == cudaSuccess) status = upload(matrices, steps * 48, w.matrices, stream);
  if (status == cudaSuccess) status = upload(weights, count * (chains + 2) * 4, w.weights, stream);
  if (status == cudaSuccess) status = resize(frames, count, size, w.plain, stream);
  if (status != cudaSuccess) return status;
  const dim3 blocks(static_cast<unsigned>(chains + 1), static_cast<unsigned>(count));
  run_chains<<<blocks, kChainThreads, 0, stream>>>(w, channels);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  switch (type) {
    case kViewFloat: return launch_mix(w, count, static_cast<float*>(out), stream);
    case kViewBfloat16: return launch_mix(w, count, static_cast<__nv_bfloat16*>(out), stream);
    case kViewHalf: return launch_mix(w, count, static_cast<__half*>(out), stream);
    default: return cudaErrorInvalidValue;
  }
}
