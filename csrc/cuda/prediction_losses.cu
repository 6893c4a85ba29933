// Losses over the predictions of every episode, each with its gradient, in one launch.
//
// Mean entropy and cross-entropy: a warp owns a row of up to 1024 logits (512 of double) and keeps it in registers between
// its statistics and its gradient. A longer row takes the eight warps of a block; up to 8192 logits stay in registers,
// and a row beyond that is read a second time. An episode of up to eight rows is one block, which adds the losses of
// the rows itself. Otherwise these losses go through device memory, and the last block of the episode adds them, always
// in the same order. A counter tells which block is last, and no value depends on it.
//
// Marginal entropy: a block owns an episode, and a warp a strip of classes for all rows, because a class needs its
// probability in every row. Up to 8 rows of 8 strips stay in registers. More are read again from the cache in each of the
// four steps.
#include "prediction_dtype.h"
#include "prediction_losses.h"
#include "prediction_rows.cuh"

namespace rada_fast {
namespace {

constexpr int kRowWarps = 8;

template <typename T>
constexpr int kRowChunks = sizeof(T) == 4 ? 8 : 4;
template <typename T>
constexpr int64_t kWarpLogits = kRowChunks<T> * kChunk<T>;  // logits that a warp holds

template <typename T>
struct Problem {
  const T* logits;
  const int64_t* labels;
  int64_t episodes, rows, classes;
  Acc<T> smoothing;
  Acc<T>* losses;
  T* dlogits;  // or null
  Acc<T>* row_losses;
  unsigned* counters;
};

// Returns the sum over the rows of an episode, in an order that depends only on their number.
template <typename A>
__device__ inline A sum_of(const A* values, int64_t count) {
  A sum = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) sum += values[i];
  return warp_sum(sum);
}

// block_row: the warps of a block share one row; otherwise every warp has a row of its own.
template <typename T, bool cross, bool block_row>
__global__ void __launch_bounds__(kRowWarps* kWarpSize, 1) row_losses(const Problem<T> in) {
  using A = Acc<T>;
  constexpr int chunks = kRowChunks<T>;
  __shared__ A values[kRowWarps];
  __shared__ RowStatistics<A> partial[block_row ? kRowWarps : 1];
  __shared__ bool last;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int groups = block_row ? 1 : warps;
  const int64_t blocks = (in.rows + groups - 1) / groups;  // of an episode
  const int64_t episode = blockIdx.x / blocks, row = blockIdx.x % blocks * groups + (block_row ? 0 : warp);
  const int64_t start = block_row ? warp * kWarpLogits<T> : 0, step = block_row ? warps * kWarpLogits<T> : kWarpLogits<T>;
  const A share = A(1) / static_cast<A>(in.rows);
  const Span<T> span{in.logits, in.logits + in.episodes * in.rows * in.classes};

  if (row < in.rows) {
    const int64_t index = episode * in.rows + row;
    const T* logits = in.logits + index * in.classes;
    uint4 words[chunks];
    RowStatistics<A> all = no_statistics<A>();
#pragma unroll 1
    for (int64_t k0 = start; k0 < in.classes; k0 += step) {
      load_part(logits, in.classes, k0, span, words);
      all = merged(all, lane_statistics<T>(words, lane_classes<T, chunks>(in.classes, k0)));
    }
    all = warp_merged(all);
    if constexpr (block_row) {
      if (lane == 0) partial[warp] = all;
      __syncthreads();
      all = partial[0];
      for (int w = 1; w < warps; ++w) all = merged(all, partial[w]);
    }
    if (all.largest - all.largest != 0) all.others = not_a_number<A>();
    const A log_sum = log_one_plus(all.others), inverse = 1 / (1 + all.others);
    const A average = all.spread * inverse;  // of d
    const int64_t label = cross ? in.labels[index] : 0;
    const bool known = label >= 0 && label < in.classes;
    const A uniform = in.smoothing / static_cast<A>(in.classes), rest = 1 - in.smoothing;
    // The target's value is added up separately, so that a certain prediction of one class has gradient 0.
    const A floor = share * uniform, target = share * (uniform + rest);
    const A scale = (known ? share : not_a_number<A>()) * inverse;
    A total = 0;
    if (in.dlogits || (cross && in.smoothing != 0)) {
      const bool again = in.classes > step;
#pragma unroll 1
      for (int64_t k0 = start; k0 < in.classes; k0 += step) {
        if (again) load_part(logits, in.classes, k0, span, words);
        const int left = lane_classes<T, chunks>(in.classes, k0);
        const int64_t first = k0 + lane * kPack<T>;
        const int aim = known && label >= first ? static_cast<int>(label - first < INT32_MAX ? label - first : -1) : -1;
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
          uint4 out = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) {
            const A distance = all.largest - logit<T>(words, c, i, left), p = scale * exponential(-distance);
            if constexpr (cross) {
              total += c * kChunk<T> + i < left ? distance : A(0);
              set_element<T>(out, i, p - (c * kChunk<T> + i == aim ? target : floor));
            } else {
              // -p (ln p + H) = p (d - mean d)
              set_element<T>(out, i, p == 0 ? A(0) : p * (distance - average));
            }
          }
          words[c] = out;
        }
        if (in.dlogits) store_part(in.dlogits + index * in.classes, in.classes, k0, words);
      }
    }
    A value = log_sum + average;
    if constexpr (cross) {
      value = not_a_number<A>();
      if (known) {
        // Reading the logit again costs less than finding it in the registers.
        value = log_sum + rest * (all.largest - exact(logits[label]));
      }
      if (in.smoothing != 0) {
        total = warp_sum(total);
        if constexpr (block_row) {
          if (lane == 0) values[warp] = total;
          __syncthreads();
          total = 0;
          for (int w = 0; w < warps; ++w) total += values[w];
          __syncthreads();
        }
        value += uniform * total;
      }
    }
    if (lane == 0 && (!block_row || warp == 0)) (blocks == 1 ? values : in.row_losses + episode * in.rows)[row] = value;
  }
  if (blocks > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(in.counters + episode, 1u) == static_cast<unsigned>(blocks - 1);
    __syncthreads();
    if (!last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  if (warp > 0) return;
  const A sum = sum_of(blocks == 1 ? values : in.row_losses + episode * in.rows, in.rows);
  if (lane == 0) in.losses[episode] = sum * share;
}

// ---- marginal entropy

constexpr int kResidentRows = 8, kResidentWarps = 8;
template <typename T>
constexpr int kReadingWarps = sizeof(T) == 8 ? 4 : 8;  // the most that shared memory allows for kMostMarginalRows

template <bool resident, typename Body>
__device__ inline void for_rows(int rows, const Body& body) {
  if constexpr (resident) {
#pragma unroll
    for (int r = 0; r < kResidentRows; ++r)
      if (r < rows) body(r);
  } else {
#pragma unroll 1
    for (int r = 0; r < rows; ++r) body(r);
  }
}

template <typename A>
size_t marginal_shared(int warps, int64_t rows) {
  return sizeof(A) * ((2 * warps + 4) * rows + warps);
}

template <typename T, bool resident>
__global__ void __launch_bounds__(resident ? kResidentWarps * kWarpSize : kReadingWarps<T>* kWarpSize, 1)
    marginal_losses(const Problem<T> in) {
  using A = Acc<T>;
  constexpr int pack = kPack<T>;
  extern __shared__ double shared_memory[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int rows = static_cast<int>(in.rows);
  // Per warp and row, twice; per row: the largest logit, 1 / sum, the origin and the centre; per warp: its entropy.
  A* first = reinterpret_cast<A*>(shared_memory);
  A *second = first + warps * rows, *largest = second + warps * rows, *inverse = largest + rows;
  A *origin = inverse + rows, *centre = origin + rows, *entropy = centre + rows;

  const int64_t offset = static_cast<int64_t>(blockIdx.x) * rows * in.classes;
  const T* logits = in.logits + offset;
  const Span<T> span{in.logits, in.logits + in.episodes * in.rows * in.classes};
  const int64_t start = warp * kChunk<T>, step = warps * kChunk<T>;
  const A share = A(1) / static_cast<A>(rows), log_share = logarithm(share);

  uint4 resident_words[resident ? kResidentRows : 1][1];
  if constexpr (resident)
    for_rows<resident>(rows, [&](int r) {
      if (start < in.classes) load_part(logits + r * in.classes, in.classes, start, span, resident_words[r]);
    });
  const auto row_word = [&](int r, int64_t k0) {
    if constexpr (resident) {
      return resident_words[r][0];
    } else {
      uint4 word[1];
      load_part(logits + r * in.classes, in.classes, k0, span, word);
      return word[0];
    }
  };
  const auto at = [&](const uint4& word, int i, int64_t k0) {
    return i < lane_classes<T, 1>(in.classes, k0) ? element<T>(word, i) : -infinity<A>();
  };
  const auto probability = [&](A x, int r) { return exponential(x - largest[r]) * inverse[r]; };

  // 1. Every row's largest logit and sum of exponentials.
  for (int r = lane; r < rows; r += kWarpSize) {
    first[warp * rows + r] = -infinity<A>();
    second[warp * rows + r] = 0;
  }
  __syncwarp();
#pragma unroll 1
  for (int64_t k0 = start; k0 < in.classes; k0 += step) {
    for_rows<resident>(rows, [&](int r) {
      const uint4 word = row_word(r, k0);
      A best = -infinity<A>(), sum = 0;
#pragma unroll
      for (int i = 0; i < pack; ++i) best = larger(best, at(word, i, k0));
      best = warp_largest(best);
      const A safe = best > -infinity<A>() ? best : A(0);
#pragma unroll
      for (int i = 0; i < pack; ++i) sum += exponential(at(word, i, k0) - safe);
      sum = warp_sum(sum);
      if (lane == 0) {
        const A before = first[warp * rows + r], both = larger(before, best);
        const A rescaled = before > -infinity<A>() ? second[warp * rows + r] * exponential(before - both)
                                                   : second[warp * rows + r];
        first[warp * rows + r] = both;
        second[warp * rows + r] = rescaled + (best > -infinity<A>() ? sum * exponential(best - both) : sum);
      }
      __syncwarp();
    });
  }
  __syncthreads();
  for (int r = warp; r < rows; r += warps) {
    const A part = lane < warps ? first[lane * rows + r] : -infinity<A>();
    const A best = warp_largest(part);
    A sum = lane < warps ? second[lane * rows + r] : A(0);
    if (part > -infinity<A>()) sum *= exponential(part - best);
    sum = warp_sum(sum);
    if (lane == 0) {
      largest[r] = best;
      inverse[r] = best - best == 0 ? 1 / sum : not_a_number<A>();
    }
  }
  __syncthreads();

  A log_mean[pack];  // ln q of the strip
  A sum_entropy = 0;
  const auto take_mean = [&](int64_t k0) {
    A total[pack] = {};
    for_rows<resident>(rows, [&](int r) {
      const uint4 word = row_word(r, k0);
#pragma unroll
      for (int i = 0; i < pack; ++i) total[i] += probability(at(word, i, k0), r);
    });
#pragma unroll
    for (int i = 0; i < pack; ++i) {
      // The logarithm is that of the sum, which is no smaller than any term. The mean could be 0 where a probability is
      // not.
      log_mean[i] = logarithm(total[i]) + log_share;
      total[i] = total[i] == 0 ? A(0) : share * total[i] * log_mean[i];
      sum_entropy -= i < lane_classes<T, 1>(in.classes, k0) ? total[i] : A(0);
    }
  };

  // 2. The mean prediction, its entropy, and ln q of every row's likeliest class.
  for (int r = lane; r < rows; r += kWarpSize) first[warp * rows + r] = -infinity<A>();
  __syncwarp();
#pragma unroll 1
  for (int64_t k0 = start; k0 < in.classes; k0 += step) {
    take_mean(k0);
    if (in.dlogits)
      for_rows<resident>(rows, [&](int r) {
        const uint4 word = row_word(r, k0);
        A best = -infinity<A>();
#pragma unroll
        for (int i = 0; i < pack; ++i)
          if (at(word, i, k0) == largest[r]) best = larger(best, log_mean[i]);
        best = warp_largest(best);
        if (lane == 0) first[warp * rows + r] = larger(first[warp * rows + r], best);
        __syncwarp();
      });
  }
  sum_entropy = warp_sum(sum_entropy);
  if (lane == 0) entropy[warp] = sum_entropy;
  __syncthreads();
  if (threadIdx.x == 0) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += entropy[w];
    in.losses[blockIdx.x] = total;
  }
  if (!in.dlogits) return;
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    A best = first[r];
    for (int w = 1; w < warps; ++w) best = larger(best, first[w * rows + r]);
    origin[r] = best;
  }
  for (int r = lane; r < rows; r += kWarpSize) second[warp * rows + r] = 0;
  __syncthreads();

  // 3. sum_k p_k ln q_k, where all ln q are taken relative to that of the row's likeliest class: its p may be near 1, and
  // the terms of the other classes would be lost beside it.
#pragma unroll 1
  for (int64_t k0 = start; k0 < in.classes; k0 += step) {
    if constexpr (!resident) take_mean(k0);
    for_rows<resident>(rows, [&](int r) {
      const uint4 word = row_word(r, k0);
      A sum = 0;
#pragma unroll
      for (int i = 0; i < pack; ++i) {
        const A p = probability(at(word, i, k0), r);
        sum += p == 0 || i >= lane_classes<T, 1>(in.classes, k0) ? A(0) : p * (log_mean[i] - origin[r]);
      }
      sum = warp_sum(sum);
      if (lane == 0) second[warp * rows + r] += sum;
      __syncwarp();
    });
  }
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    A total = 0;
    for (int w = 0; w < warps; ++w) total += second[w * rows + r];
    centre[r] = total;
  }
  __syncthreads();

  // 4. The gradient p (sum_k p_k ln q_k - ln q) / n.
#pragma unroll 1
  for (int64_t k0 = start; k0 < in.classes; k0 += step) {
    if constexpr (!resident) take_mean(k0);
    for_rows<resident>(rows, [&](int r) {
      const uint4 word = row_word(r, k0);
      uint4 out[1] = {{0, 0, 0, 0}};
#pragma unroll
      for (int i = 0; i < pack; ++i) {
        const A p = share * probability(at(word, i, k0), r);
        set_element<T>(out[0], i, p == 0 ? A(0) : p * ((origin[r] - log_mean[i]) + centre[r]));
      }
      store_part(in.dlogits + offset + r * in.classes, in.classes, k0, out);
    });
  }
}

// ---- launchers

struct RowLayout {
  bool block_row;
  int warps;
  int64_t blocks;  // of an episode
};

RowLayout layout_of(int dtype, int64_t rows, int64_t classes) {
  const int64_t warp_logits = dtype == kFloat64   ? kWarpLogits<double>
                              : dtype == kFloat32 ? kWarpLogits<float>
                                                  : kWarpLogits<__half>;
  const bool block_row = classes > warp_logits;
  const int64_t parts = (classes + warp_logits - 1) / warp_logits, wanted = block_row ? parts : rows;
  const int warps = static_cast<int>(wanted < kRowWarps ? wanted : kRowWarps);
  return {block_row, warps, block_row ? rows : (rows + warps - 1) / warps};
}

template <typename T>
cudaError_t launch(const Problem<T>& in, int kind, const RowLayout& layout, cudaStream_t stream) {
  using A = Acc<T>;
  if (kind == kMarginalEntropy) {
    const int64_t strips = (in.classes + kChunk<T> - 1) / kChunk<T>;
    const bool resident = in.rows <= kResidentRows && strips <= kResidentWarps;
    const int most = resident ? kResidentWarps : kReadingWarps<T>;
    const int warps = static_cast<int>(strips < most ? strips : most);
    const auto grid = static_cast<unsigned>(in.episodes);
    const size_t shared = marginal_shared<A>(warps, in.rows);
    if (resident)
      marginal_losses<T, true><<<grid, warps * kWarpSize, shared, stream>>>(in);
    else
      marginal_losses<T, false><<<grid, warps * kWarpSize, shared, stream>>>(in);
    return cudaGetLastError();
  }
  if (layout.blocks > 1) {
    const cudaError_t status = cudaMemsetAsync(in.counters, 0, in.episodes * sizeof(unsigned), stream);
    if (status != cudaSuccess) return status;
  }
  const auto grid = static_cast<unsigned>(in.episodes * layout.blocks);
  const int threads = layout.warps * kWarpSize;
  if (kind == kCrossEntropy) {
    if (layout.block_row)
      row_losses<T, true, true><<<grid, threads, 0, stream>>>(in);
    else
      row_losses<T, true, false><<<grid, threads, 0, stream>>>(in);
  } else {
    if (layout.block_row)
      row_losses<T, false, true><<<grid, threads, 0, stream>>>(in);
    else
      row_losses<T, false, false><<<grid, threads, 0, stream>>>(in);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_of(const void* logits, const int64_t* labels, int kind, int64_t episodes, int64_t rows,
                      int64_t classes, double smoothing, void* losses, void* dlogits, void* workspace,
                      const RowLayout& layout, cudaStream_t stream) {
  using A = Acc<T>;
  A* row_losses = static_cast<A*>(workspace);
  auto* counters = reinterpret_cast<unsigned*>(row_losses ? row_losses + episodes * rows : nullptr);
  return launch<T>({static_cast<const T*>(logits), labels, episodes, rows, classes, static_cast<A>(smoothing),
                    static_cast<A*>(losses), static_cast<T*>(dlogits), row_losses, counters},
                   kind, layout, stream);
}

}  // namespace
}  // namespace rada_fast

extern "C" int64_t rada_fast_prediction_loss_workspace(int kind, int dtype, int64_t episodes, int64_t rows,
                                                       int64_t classes) {
  using namespace rada_fast;
  const int64_t blocks = kind == kMarginalEntropy ? 1 : layout_of(dtype, rows, classes).blocks;
  if (episodes * blocks > INT32_MAX) return -1;
  if (blocks == 1) return 0;
  return episodes * (rows * (dtype == kFloat64 ? 8 : 4) + 4);
}

extern "C" cudaError_t rada_fast_prediction_loss(const void* logits, const int64_t* labels, int kind, int dtype,
                                                 int64_t episodes, int64_t rows, int64_t classes, double smoothing,
                                                 void* losses, void* dlogits, void* workspace, cudaStream_t stream) {
  using namespace rada_fast;
  if (episodes < 0 || rows < 1 || classes < 1 || (kind == kMarginalEntropy && rows > kMostMarginalRows))
    return cudaErrorInvalidValue;
  // The pointers of empty tensors are null, and a grid of no blocks is an error.
  if (episodes == 0) return cudaSuccess;
  if ((kind == kCrossEntropy) != (labels != nullptr)) return cudaErrorInvalidValue;
  const RowLayout layout = layout_of(dtype, rows, classes);
  const int64_t bytes = rada_fast_prediction_loss_workspace(kind, dtype, episodes, rows, classes);
  if (bytes < 0 || (bytes > 0 && !workspace)) return cudaErrorInvalidValue;
  const auto with = [&](auto launcher) {
    return launcher(logits, labels, kind, episodes, rows, classes, smoothing, losses, dlogits, workspace, layout, stream);
  };
  switch (dtype) {
    case kFloat32: return with(launch_of<float>);
    case kFloat64: return with(launch_of<double>);
    case kBFloat16: return with(launch_of<__nv_bfloat16>);
    case kFloat16: return with(launch_of<__half>);
    default: return cudaErrorInvalidValue;
  }
}
