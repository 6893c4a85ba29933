#include "multi_view_crops.h"
#include "view_frames.h"

namespace rada_fast {
namespace {

Tensor multi_view_crops(std::vector<Tensor> pictures, const Tensor& views, int64_t size, std::vector<double> mean,
                        std::vector<double> std, ScalarType dtype, bool tall_first) {
  const std::vector<ViewFrame> frames = view_frames(pictures, views, size, tall_first);
  const std::vector<float> means = channel_values(mean, "mean"), deviations = channel_values(std, "std");
  const int type = view_type(dtype);
  const Launch launch(pictures[0]);
  const int64_t count = static_cast<int64_t>(frames.size());
  Tensor out = torch::stable::new_empty(pictures[0], {count, 3, size, size}, dtype);
  check(rada_fast_multi_view_crops(frames.data(), count, static_cast<int32_t>(size), means.data(), deviations.data(),
                                   type, out.mutable_data_ptr(), launch.stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) {
  library.impl("multi_view_crops", TORCH_BOX(&multi_view_crops));
}

}  // namespace rada_fast
