#include "instruction_set.h"

#include <ATen/Version.h>

#include <string>

namespace rada_fast {

Level level() {
  static const Level found = [] {
#if defined(__x86_64__)
    // PyTorch's choice honours ATEN_CPU_CAPABILITY. The processor is asked as well, because the copies here need more
    // instructions than PyTorch's names promise.
    const std::string torch = at::get_cpu_capability();
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (torch.rfind("AVX512", 0) == 0 && has_avx512) return Level::avx512;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (torch.rfind("AVX", 0) == 0 && has_avx2) return Level::avx2;
#endif
    return Level::baseline;
  }();
  return found;
}

const char* level_name() {
  switch (level()) {
    case Level::avx512: return "AVX512";
    case Level::avx2: return "AVX2";
    default: return "baseline";
  }
}

}  // namespace rada_fast
