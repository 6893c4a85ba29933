// Which copy of the vector loops this processor runs.
#include <ATen/Version.h>

#include <string>

#include "augmix_loops.h"
#include "instruction_set.h"
#include "vector_math.h"
#include "view_loops.h"

namespace rada_fast {

Level level() {
  static const Level found = [] {
#if defined(__x86_64__)
    // PyTorch's choice honours ATEN_CPU_CAPABILITY; the processor itself is asked too, since the copies here want more
    // than PyTorch's name promises.
    const std::string torch = at::get_cpu_capability();
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (torch.rfind("AVX512", 0) == 0 && wide) return Level::avx512;
    const bool middle = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (torch.rfind("AVX", 0) == 0 && middle) return Level::avx2;
#endif
    return Level::baseline;
  }();
  return found;
}

const char* vector_math_name() {
  switch (level()) {
    case Level::avx512: return "AVX512";
    case Level::avx2: return "AVX2";
    default: return "baseline";
  }
}

template <typename T>
const VectorMath<T>& vector_math() {
#if defined(__x86_64__)
  if (level() == Level::avx512) return avx512::vector_math<T>();
  if (level() == Level::avx2) return avx2::vector_math<T>();
#endif
  return baseline::vector_math<T>();
}
template const VectorMath<float>& vector_math<float>();
template const VectorMath<double>& vector_math<double>();
template const VectorMath<BF16>& vector_math<BF16>();
template const VectorMath<WideBF16>& vector_math<WideBF16>();

const AugmixLoops& augmix_loops() {
#if defined(__x86_64__)
  if (level() == Level::avx512) return avx512::augmix_loops();
  if (level() == Level::avx2) return avx2::augmix_loops();
#endif
  return baseline::augmix_loops();
}

const ViewLoops& view_loops() {
#if defined(__x86_64__)
  if (level() == Level::avx512) return avx512::view_loops();
  if (level() == Level::avx2) return avx2::view_loops();
#endif
  return baseline::view_loops();
}

}  // namespace rada_fast
