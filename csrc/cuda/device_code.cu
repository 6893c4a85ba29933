#include "device_code.h"

namespace rada_fast {
namespace {

__global__ void __launch_bounds__(32) device_architecture(int32_t* architecture) {
#ifdef __CUDA_ARCH__
  if (threadIdx.x == 0) *architecture = __CUDA_ARCH__;
#endif
}

}  // namespace
}  // namespace rada_fast

extern "C" cudaError_t rada_fast_device_architecture(int32_t* architecture, cudaStream_t stream) {
  rada_fast::device_architecture<<<1, 32, 0, stream>>>(architecture);
  return cudaGetLastError();
}
