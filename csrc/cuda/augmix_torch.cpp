#include "augmix.h"
#include "view_frames.h"

namespace rada_fast {
namespace {

Tensor augmix(std::vector<Tensor> pictures, const Tensor& views, const Tensor& given_operations,
              const Tensor& given_matrices, const Tensor& given_weights, int64_t size, std::vector<double> mean,
              std::vector<double> std, ScalarType dtype, bool tall_first) {
  const std::vector<ViewFrame> frames = view_frames(pictures, views, size, tall_first);
  const std::vector<float> means = channel_values(mean, "mean"), deviations = channel_values(std, "std");
  const int type = view_type(dtype);
  const int64_t count = static_cast<int64_t>(frames.size());
  STD_TORCH_CHECK(given_operations.is_cpu() && given_matrices.is_cpu() && given_weights.is_cpu() &&
                      given_operations.dim() == 3 && given_operations.size(0) == count &&
                      given_operations.scalar_type() == ScalarType::Long,
                  "operations must be (N, chains, depth) int64 on the CPU, with the matrices and weights");
  const int64_t chains = given_operations.size(1), depth = given_operations.size(2);
  STD_TORCH_CHECK(given_matrices.scalar_type() == ScalarType::Double && given_matrices.dim() == 4 &&
                      given_matrices.numel() == count * chains * depth * 6 &&
                      given_weights.scalar_type() == ScalarType::Float && given_weights.dim() == 2 &&
                      given_weights.numel() == count * (chains + 2),
                  "matrices must be (N, chains, depth, 6) float64 and weights (N, chains + 2) float32");
  STD_TORCH_CHECK(size <= kMostAugmixSize, "size must be at most ", kMostAugmixSize, " for AugMix, got ", size);
  STD_TORCH_CHECK(count <= kMostAugmixViews, "views must be at most ", kMostAugmixViews, " for AugMix on CUDA, got ",
                  count);
  const Tensor operations = torch::stable::contiguous(given_operations);
  const Tensor matrices = torch::stable::contiguous(given_matrices);
  const Tensor weights = torch::stable::contiguous(given_weights);
  const int64_t* codes = operations.const_data_ptr<int64_t>();
  const double* values = matrices.const_data_ptr<double>();
  for (int64_t i = 0; i < count * chains * depth; ++i) {
    STD_TORCH_CHECK(codes[i] >= 0 && codes[i] < kOperations, "operations must be 0..", kOperations - 1,
                    ", got ", codes[i]);
    STD_TORCH_CHECK(static_cast<Operation>(codes[i]) != Operation::posterize ||
                        (values[6 * i] >= 1 && values[6 * i] <= 8),
                    "posterize keeps 1 to 8 bits, got ", values[6 * i]);
    for (int64_t j = 0; j < 6; ++j)
      STD_TORCH_CHECK(values[6 * i + j] >= -1e9 && values[6 * i + j] <= 1e9, "matrices must be within 1e9");
  }
  const Launch launch(pictures[0]);
  const int32_t side = static_cast<int32_t>(size);
  Tensor out = torch::stable::new_empty(pictures[0], {count, 3, size, size}, dtype);
  Tensor scratch = torch::stable::new_empty(pictures[0], {rada_fast_augmix_scratch(count, chains, depth, side)},
                                            ScalarType::Byte);
  check(rada_fast_augmix(frames.data(), count, side, chains, depth, codes, values, weights.const_data_ptr<float>(),
                         means.data(), deviations.data(), type, scratch.mutable_data_ptr(), out.mutable_data_ptr(),
                         launch.stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) { library.impl("augmix", TORCH_BOX(&augmix)); }

}  // namespace rada_fast
