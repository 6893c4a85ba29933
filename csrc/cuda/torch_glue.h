// The declarations that every *_torch.cpp of this folder needs. They use the LibTorch stable ABI and neither ATen nor c10,
// so one library serves every PyTorch from 2.10 on with the same CUDA major version.
//
// The stable ABI lacks a single call: torch::stable gives a stream's cudaStream_t only from 2.13 on
// (Stream::nativeHandle). The C shim of AOTInductor, which is stable too, gives it in every version.
//
// The function that connects a kernel to PyTorch takes the tensors by value or as std::optional / std::vector of them,
// makes a Launch from one of them, calls the launcher with pointers and launch.stream, and passes its result to
// check().
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace rada_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// While a Launch lives, the tensor's device is the current one; `stream` is PyTorch's current stream on that device.
struct Launch {
  explicit Launch(const Tensor& on) : guard(on.get_device_index()) {
    void* current = nullptr;
    // The check is spelt out because PyTorch's own macros for it changed their names between 2.11 and 2.14.
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                    "PyTorch gives no current stream of CUDA device ", on.get_device_index());
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

// Throws with CUDA's message where a launcher did not return cudaSuccess.
inline void check(cudaError_t status) { STD_CUDA_CHECK(status); }

}  // namespace rada_fast
