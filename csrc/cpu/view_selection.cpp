// Computes the entropies of all views' predictions, and the indices of the lowest ones of every episode.
//
// The work is done in two steps, first over rows of logits and then over episodes, so that a single episode keeps all
// threads busy too. The choice is a partial sort by (entropy, index), a total order in which NaN is last.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "prediction_rows.h"

namespace rada_fast {
namespace {

using at::Tensor;

template <typename T>
void entropies_of(const Tensor& logits, Tensor& entropies) {
  using A = Acc<T>;
  const PredictionLoops<T>& loops = chosen_loops<PredictionLoops<T>>();
  const int64_t rows = entropies.numel(), classes = logits.size(2);
  const T* in = static_cast<const T*>(logits.const_data_ptr());
  A* out = entropies.mutable_data_ptr<A>();
  at::parallel_for(0, rows, rows_per_task(classes), [&](int64_t begin, int64_t end) {
    A* scratch = Scratch::rewound().take<A>(loops.scratch_row(classes));
    for (int64_t r = begin; r < end; ++r)
      out[r] = loops.entropy(in + r * classes, classes, A(0), scratch, nullptr);
  });
}

template <typename A>
void lowest(const Tensor& entropies, int64_t count, Tensor& indices) {
  const int64_t views = entropies.size(1);
  const A* in = entropies.const_data_ptr<A>();
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  at::parallel_for(0, entropies.size(0), rows_per_task(4 * views), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order(views);
    for (int64_t e = begin; e < end; ++e) {
      const A* value = in + e * views;
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + count, order.end(), [value](int64_t a, int64_t b) {
        const bool nan_a = std::isnan(value[a]), nan_b = std::isnan(value[b]);
        if (nan_a != nan_b) return nan_b;
        if (nan_a || value[a] == value[b]) return a < b;
        return value[a] < value[b];
      });
      std::copy_n(order.begin(), count, out + e * count);
    }
  });
}

std::tuple<Tensor, Tensor> select_views(const Tensor& logits_, int64_t count) {
  TORCH_CHECK(logits_.dim() == 3 && logits_.size(2) > 0, "logits must be (E, V, K) with K >= 1, got ", logits_.sizes());
  TORCH_CHECK(count >= 0 && count <= logits_.size(1), "count must be from 0 to V = ", logits_.size(1), ", got ", count);
  const Tensor logits = logits_.contiguous();
  Tensor entropies = at::empty({logits.size(0), logits.size(1)}, logits.options().dtype(exact_type(logits)));
  Tensor indices = at::empty({logits.size(0), count}, logits.options().dtype(at::kLong));
  with_loop_type(logits, [&]<typename T>() {
    entropies_of<T>(logits, entropies);
    lowest<Acc<T>>(entropies, count, indices);
  });
  return {indices, entropies};
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("select_views", &select_views); }

}  // namespace rada_fast
