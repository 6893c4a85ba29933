#include <cstdint>
#include <tuple>

#include "prediction_glue.h"
#include "view_selection.h"

namespace rada_fast {
namespace {

std::tuple<Tensor, Tensor> select_views(const Tensor& given, int64_t count) {
  STD_TORCH_CHECK(given.dim() == 3 && given.size(1) > 0 && given.size(2) > 0,
                  "logits must be (E, V, K) with V >= 1 and K >= 1");
  const int64_t episodes = given.size(0), views = given.size(1), classes = given.size(2);
  STD_TORCH_CHECK(count >= 0 && count <= views, "count must be from 0 to V = ", views, ", got ", count);
  STD_TORCH_CHECK(episodes <= INT32_MAX, "logits must have at most ", INT32_MAX, " episodes on CUDA, got ", episodes);
  const int dtype = prediction_type(given);
  const Launch launch(given);
  const Tensor logits = torch::stable::contiguous(given);
  Tensor indices = torch::stable::new_empty(logits, {episodes, count}, ScalarType::Long);
  Tensor entropies = torch::stable::new_empty(logits, {episodes, views}, exact_type(logits));
  check(rada_fast_select_views(logits.const_data_ptr(), dtype, episodes, views, classes, count,
                               indices.mutable_data_ptr<int64_t>(), entropies.mutable_data_ptr(), launch.stream));
  return {indices, entropies};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) { library.impl("select_views", TORCH_BOX(&select_views)); }

}  // namespace rada_fast
