// A block owns kChunk elements of one copy of one tensor. The descriptors of the tensors are a kernel parameter, so a step
// of up to kMostTensors tensors is one launch and needs no table in device memory.
//
// Every element is read and written once: the parameter p, its moments m and v and its gradient g are read, and p, m and v
// are written. The first step reads only g, and p from the one copy that all episodes start from. The copies of one chunk
// belong to neighbouring blocks, so that the chunk stays in the cache.
#include "episodic_optimizer.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rada_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // floats in 16 bytes
// With four accesses per thread a block handles 16 KiB of each array, little enough that the last blocks end together.
constexpr int64_t kChunk = 4 * kWidth * kThreads;
// This many descriptors of 80 bytes fit into the 4 KiB of kernel parameters that every device accepts.
constexpr int kMostTensors = 50;

struct Descriptor {
  OptimizerTensor tensor;
  int32_t last_block;  // the number of blocks of this tensor and of all before it
  int32_t vectors;     // whether 16-byte accesses are aligned
};

struct Batch {
  OptimizerScalars scalars;
  int32_t count;
  Descriptor tensors[kMostTensors];
};
static_assert(sizeof(Batch) <= 4096);

template <int kElements>
struct Values {
  float at[kElements];
};

// store() names its instruction: left to itself, the compiler splits some of the vectors.
template <int kElements>
__device__ __forceinline__ Values<kElements> load(const float* from) {
  if constexpr (kElements == 1) {
    return {*from};
  } else {
    const float4 four = *reinterpret_cast<const float4*>(from);
    return {four.x, four.y, four.z, four.w};
  }
}

template <int kElements>
__device__ __forceinline__ void store(float* to, const Values<kElements>& values) {
  if constexpr (kElements == 1)
    *to = values.at[0];
  else
    __stwb(reinterpret_cast<float4*>(to), make_float4(values.at[0], values.at[1], values.at[2], values.at[3]));
}

__device__ __forceinline__ float widen(uint32_t bits, GradientType type) {
  return type == GradientType::bfloat16 ? __uint_as_float(bits << 16)
                                        : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <int kElements>
__device__ __forceinline__ Values<kElements> load_gradient(const OptimizerTensor& t, int64_t at) {
  if (t.type == GradientType::none) return {};
  if (t.type == GradientType::float32) return load<kElements>(static_cast<const float*>(t.gradient) + at);
  const uint16_t* from = static_cast<const uint16_t*>(t.gradient) + at;
  if constexpr (kElements == 1) {
    return {widen(*from, t.type)};
  } else {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    return {widen(two.x & 0xffffu, t.type), widen(two.x >> 16, t.type), widen(two.y & 0xffffu, t.type),
            widen(two.y >> 16, t.type)};
  }
}

__device__ __forceinline__ uint32_t narrow(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Stores the new values and their copy for products. After the last step only the copy is read.
template <int kElements>
__device__ __forceinline__ void store_parameter(const OptimizerScalars& s, const OptimizerTensor& t, int64_t at,
                                                const Values<kElements>& p) {
  if (t.copy == nullptr || !s.last) store<kElements>(t.parameter + at, p);
  if (t.copy == nullptr) return;
  if constexpr (kElements == 1) {
    t.copy[at] = static_cast<uint16_t>(narrow(p.at[0]));
  } else {
    *reinterpret_cast<uint2*>(t.copy + at) =
        make_uint2(narrow(p.at[0]) | narrow(p.at[1]) << 16, narrow(p.at[2]) | narrow(p.at[3]) << 16);
  }
}

// Every rounding of ../shared/episodic_optimizer.h is written out here, so that the compiler cannot change any of them.
__device__ __forceinline__ void adam(const OptimizerScalars& s, float g, float& p, float& m, float& v) {
  if (s.weight_decay != 0.0f) g = __fmaf_rn(s.weight_decay, p, g);
  const float w = s.first_weight, change = __fsub_rn(g, m);
  m = w < 0.5f ? __fmaf_rn(w, change, m) : __fmaf_rn(__fsub_rn(w, 1.0f), change, g);
  v = __fmaf_rn(__fmul_rn(s.second_weight, g), g, __fmul_rn(v, s.beta2));
  const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root_divisor), s.eps);
  p = __fadd_rn(__fmul_rn(p, s.decay), __fdiv_rn(__fmul_rn(s.step_size, m), denominator));
}

__device__ __forceinline__ void sgd(const OptimizerScalars& s, bool has_momentum, bool fresh, float g, float& p,
                                    float& m) {
  if (s.weight_decay != 0.0f) g = __fmaf_rn(s.weight_decay, p, g);
  if (has_momentum && !fresh) g = __fadd_rn(__fmul_rn(m, s.momentum), g);
  m = g;
  p = __fmaf_rn(s.step_size, g, p);
}

template <bool kSgd, int kElements>
__device__ __forceinline__ void step_elements(const OptimizerScalars& s, const OptimizerTensor& t, int64_t row_start,
                                              int64_t i) {
  const int64_t at = row_start + i;
  const bool kept = t.first != nullptr, read = kept && !t.fresh;
  auto p = load<kElements>(t.source == t.parameter ? t.parameter + at : t.source + i);
  if (!kSgd && !kept) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) p.at[e] = __fmul_rn(p.at[e], s.decay);
    store_parameter<kElements>(s, t, at, p);
    return;
  }
  Values<kElements> m{}, v{};
  if (read) m = load<kElements>(t.first + at);
  if (read && !kSgd) v = load<kElements>(t.second + at);
  const auto g = load_gradient<kElements>(t, at);
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if constexpr (kSgd) sgd(s, kept, t.fresh, g.at[e], p.at[e], m.at[e]);
    else adam(s, g.at[e], p.at[e], m.at[e], v.at[e]);
  }
  store_parameter<kElements>(s, t, at, p);
  if (s.last) return;
  if (kept) store<kElements>(t.first + at, m);
  if (!kSgd) store<kElements>(t.second + at, v);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocks = 3;  // AdamW takes 70 registers on sm_120, and four blocks leave 64 for each thread.
#else
constexpr int kBlocks = 4;
#endif

template <bool kSgd>
__global__ void __launch_bounds__(kThreads, kBlocks) episodic_optimizer(const __grid_constant__ Batch batch) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (block < batch.tensors[middle].last_block) high = middle;
    else low = middle + 1;
  }
  // These are copies, so that all values that an element needs are in registers.
  const OptimizerTensor t = batch.tensors[low].tensor;
  const OptimizerScalars s = batch.scalars;
  const int64_t local = block - (low ? batch.tensors[low - 1].last_block : 0);
  const int64_t row_start = local % t.rows * t.row, begin = local / t.rows * kChunk;
  const int64_t end = begin + kChunk < t.row ? begin + kChunk : t.row;
  int64_t scalar_begin = begin;
  if (batch.tensors[low].vectors) {
    scalar_begin = end - (end - begin) % kWidth;
    for (int64_t i = begin + kWidth * threadIdx.x; i < scalar_begin; i += kWidth * kThreads)
      step_elements<kSgd, kWidth>(s, t, row_start, i);
  }
  for (int64_t i = scalar_begin + threadIdx.x; i < end; i += kThreads)
    step_elements<kSgd, 1>(s, t, row_start, i);
}

bool aligned(const OptimizerTensor& t) {
  const auto off = [](const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  const uintptr_t narrow = t.type == GradientType::float32 ? 16 : 8;
  return !(off(t.parameter, 16) || off(t.source, 16) || off(t.first, 16) || off(t.second, 16) ||
           off(t.gradient, narrow) || off(t.copy, 8) || (t.rows > 1 && t.row % kWidth));
}

}  // namespace
}  // namespace rada_fast

extern "C" cudaError_t rada_fast_episodic_optimizer(const rada_fast::OptimizerTensor* tensors, int64_t count,
                                                    const rada_fast::OptimizerScalars* scalars, cudaStream_t stream) {
  using namespace rada_fast;
  constexpr int64_t kMostBlocks = INT32_MAX;
  for (int64_t next = 0; next < count;) {
    Batch batch{};
    batch.scalars = *scalars;
    int64_t blocks = 0;
    for (; next < count && batch.count < kMostTensors; ++next) {
      const OptimizerTensor& t = tensors[next];
      const int64_t more = (t.row + kChunk - 1) / kChunk * t.rows;
      if (more > kMostBlocks) return cudaErrorInvalidValue;
      if (blocks + more > kMostBlocks) break;
      blocks += more;
      batch.tensors[batch.count++] = {t, static_cast<int32_t>(blocks), aligned(t)};
    }
    if (blocks == 0) continue;
    if (scalars->rule == OptimizerRule::sgd)
      episodic_optimizer<true><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
    else
      episodic_optimizer<false><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
