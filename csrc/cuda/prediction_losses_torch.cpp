#include <optional>
#include <string>
#include <tuple>

#include "prediction_glue.h"
#include "prediction_losses.h"

namespace rada_fast {
namespace {

int kind_named(const std::string& name) {
  if (name == "mean") return kMeanEntropy;
  if (name == "marginal") return kMarginalEntropy;
  STD_TORCH_CHECK(name == "cross_entropy", "kind must be 'mean', 'marginal' or 'cross_entropy', got '", name, "'");
  return kCrossEntropy;
}

std::tuple<Tensor, Tensor> prediction_loss(const Tensor& given, std::string name, std::optional<Tensor> given_labels,
                                           double smoothing, bool keep) {
  const int kind = kind_named(name), dtype = prediction_type(given);
  STD_TORCH_CHECK(given.dim() == 3 && given.size(1) > 0 && given.size(2) > 0,
                  "logits must be (E, n, K) with n >= 1 and K >= 1");
  const int64_t episodes = given.size(0), rows = given.size(1), classes = given.size(2);
  STD_TORCH_CHECK(given_labels.has_value() == (kind == kCrossEntropy), "labels belong to kind 'cross_entropy' alone");
  STD_TORCH_CHECK(kind != kMarginalEntropy || rows <= kMostMarginalRows, "marginal entropy on CUDA takes at most ",
                  kMostMarginalRows, " predictions an episode, got ", rows);
  const Launch launch(given);
  const Tensor logits = torch::stable::contiguous(given);
  std::optional<Tensor> labels;
  if (given_labels) {
    STD_TORCH_CHECK(given_labels->dim() == 2 && given_labels->size(0) == episodes && given_labels->size(1) == rows &&
                        given_labels->scalar_type() == ScalarType::Long &&
                        given_labels->get_device_index() == given.get_device_index(),
                    "labels must be (E, n) int64 beside the logits");
    labels = torch::stable::contiguous(*given_labels);
  }
  Tensor losses = torch::stable::new_empty(logits, {episodes}, exact_type(logits));
  Tensor dlogits = keep ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0});
  const int64_t bytes = rada_fast_prediction_loss_workspace(kind, dtype, episodes, rows, classes);
  STD_TORCH_CHECK(bytes >= 0, "logits have too many rows for one launch on CUDA, got ", episodes, " episodes of ", rows);
  std::optional<Tensor> workspace;
  if (bytes) workspace = torch::stable::new_empty(logits, {bytes}, ScalarType::Byte);
  check(rada_fast_prediction_loss(logits.const_data_ptr(), labels ? labels->const_data_ptr<int64_t>() : nullptr, kind,
                                  dtype, episodes, rows, classes, smoothing, losses.mutable_data_ptr(),
                                  keep ? dlogits.mutable_data_ptr() : nullptr,
                                  workspace ? workspace->mutable_data_ptr() : nullptr, launch.stream));
  return {losses, dlogits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) { library.impl("prediction_loss", TORCH_BOX(&prediction_loss)); }

}  // namespace rada_fast
