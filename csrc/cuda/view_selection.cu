// Computes prediction entropies and chooses an episode's lowest ones, in one launch.
//
// There is one block per episode. A warp takes one view at a time, reads its K logits once, and leaves the entropy in
// shared memory. Then a thread takes a view and counts the views that come before it. This count is the rank of the
// view, and a rank below `count` is its place in the result. No step's order can vary: there is no sort and no atomic.
// With E = 1, V = 64, K = 1000 in float32 the block reads 256 KB with 16 warps of 4 KB in flight each. An SM reads some
// 64 bytes a cycle, so this takes about 4000 cycles. Several SMs would need a second launch or a cleared counter, which
// costs as much.
#include "prediction_dtype.h"
#include "prediction_rows.cuh"
#include "view_selection.h"

namespace rada_fast {
namespace {

constexpr int kTile = 1024;  // the number of entropies in shared memory at a time
constexpr int kMostWarps = 16;

// Returns whether a comes before b: it is smaller, or equal and earlier. NaN equals NaN and comes after everything else.
template <typename A>
__device__ inline bool before(A a, int64_t i, A b, int64_t j) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a || nan_b) return nan_a == nan_b ? i < j : nan_b;
  return a < b || (a == b && i < j);
}

// A lane holds 32 logits of float and of the 16-bit types, and 8 of double: with 16 warps a thread has 128 registers.
template <typename T>
constexpr int kViewChunks = sizeof(T) == 4 ? 8 : 4;

template <typename T>
__device__ Acc<T> entropy_of(const T* row, int64_t classes, const Span<T>& span) {
  using A = Acc<T>;
  constexpr int chunks = kViewChunks<T>;
  RowStatistics<A> statistics = no_statistics<A>();
#pragma unroll 1
  for (int64_t k0 = 0; k0 < classes; k0 += chunks * kChunk<T>) {
    uint4 words[chunks];
    load_part(row, classes, k0, span, words);
    statistics = merged(statistics, lane_statistics<T>(words, lane_classes<T, chunks>(classes, k0)));
  }
  const RowStatistics<A> all = warp_merged(statistics);
  const A value = log_one_plus(all.others) + all.spread / (1 + all.others);
  return all.largest - all.largest == 0 ? value : not_a_number<A>();
}

template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    select_views(const T* __restrict__ logits, Span<T> span, int64_t views, int64_t classes, int64_t count,
                 int64_t* __restrict__ indices, Acc<T>* entropies) {
  using A = Acc<T>;
  __shared__ A tile[kTile];
  __shared__ int64_t chosen[kTile];
  const int64_t episode = blockIdx.x;
  const T* rows = logits + episode * views * classes;
  A* own = entropies + episode * views;
  const int thread = threadIdx.x, threads = blockDim.x;

  for (int64_t v0 = 0; v0 < views; v0 += kTile) {
    const int count_in_tile = static_cast<int>(views - v0 < kTile ? views - v0 : kTile);
    if (v0) __syncthreads();
    for (int v = thread / kWarpSize; v < count_in_tile; v += threads / kWarpSize) {
      const A value = entropy_of(rows + (v0 + v) * classes, classes, span);
      if (thread % kWarpSize == 0) tile[v] = value;
    }
    __syncthreads();
    for (int v = thread; v < count_in_tile; v += threads) own[v0 + v] = tile[v];
  }

  for (int64_t v0 = 0; v0 < views; v0 += threads) {
    const int64_t v = v0 + thread;
    A value = 0;
    if (views > kTile) __syncthreads();
    if (v < views) value = views > kTile ? own[v] : tile[v];
    int64_t rank = 0;
    for (int64_t u0 = 0; u0 < views; u0 += kTile) {
      const int count_in_tile = static_cast<int>(views - u0 < kTile ? views - u0 : kTile);
      if (views > kTile) {
        __syncthreads();
        for (int u = thread; u < count_in_tile; u += threads) tile[u] = own[u0 + u];
        __syncthreads();
      }
      if (v < views)
        for (int u = 0; u < count_in_tile; ++u) rank += before(tile[u], u0 + u, value, v) ? 1 : 0;
    }
    // The indices go through shared memory, so that neighbouring threads write neighbouring indices.
    if (v < views && rank < count) {
      if (count <= kTile)
        chosen[rank] = v;
      else
        indices[episode * count + rank] = v;
    }
  }
  if (count > kTile) return;
  __syncthreads();
  for (int i = thread; i < count; i += threads) indices[episode * count + i] = chosen[i];
}

template <typename T>
cudaError_t launch(const void* logits_, int64_t episodes, int64_t views, int64_t classes, int64_t count,
                   int64_t* indices, void* entropies, cudaStream_t stream) {
  const T* logits = static_cast<const T*>(logits_);
  const Span<T> span{logits, logits + episodes * views * classes};
  const int warps = static_cast<int>(views < kMostWarps ? views : kMostWarps);
  select_views<T><<<static_cast<unsigned>(episodes), warps * kWarpSize, 0, stream>>>(
      logits, span, views, classes, count, indices, static_cast<Acc<T>*>(entropies));
  return cudaGetLastError();
}

}  // namespace
}  // namespace rada_fast

extern "C" cudaError_t rada_fast_select_views(const void* logits, int dtype, int64_t episodes, int64_t views,
                                              int64_t classes, int64_t count, int64_t* indices, void* entropies,
                                              cudaStream_t stream) {
  using namespace rada_fast;
  if (episodes < 0 || episodes > INT32_MAX || views < 1 || classes < 1 || count < 0 || count > views)
    return cudaErrorInvalidValue;
  if (episodes == 0) return cudaSuccess;
  switch (dtype) {
    case kFloat32: return launch<float>(logits, episodes, views, classes, count, indices, entropies, stream);
    case kFloat64: return launch<double>(logits, episodes, views, classes, count, indices, entropies, stream);
    case kBFloat16: return launch<__nv_bfloat16>(logits, episodes, views, classes, count, indices, entropies, stream);
    case kFloat16: return launch<__half>(logits, episodes, views, classes, count, indices, entropies, stream);
    default: return cudaErrorInvalidValue;
  }
}
