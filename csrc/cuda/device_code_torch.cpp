#include "device_code.h"
#include "torch_glue.h"

namespace rada_fast {
namespace {

Tensor device_architecture(const Tensor& like) {
  const Launch launch(like);
  Tensor architecture = torch::stable::new_empty(like, {}, ScalarType::Int);
  check(rada_fast_device_architecture(architecture.mutable_data_ptr<int32_t>(), launch.stream));
  return architecture;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) {
  library.impl("device_architecture", TORCH_BOX(&device_architecture));
}

}  // namespace rada_fast
