// Losses over the predictions of every episode, with their gradients in the same pass.
//
// For mean entropy and cross-entropy a task is some rows. A row is read once, and its gradient is written while its
// exponentials are still in the nearest cache. An episode's loss adds up its rows in order, so that the result does not
// depend on the number of threads. For marginal entropy a task is some episodes: every class needs all rows of its episode.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "prediction_rows.h"

namespace rada_fast {
namespace {

using at::Tensor;

enum class Kind { mean, marginal, cross_entropy };

Kind kind_named(c10::string_view name) {
  if (name == "mean") return Kind::mean;
  if (name == "marginal") return Kind::marginal;
  TORCH_CHECK(name == "cross_entropy", "kind must be 'mean', 'marginal' or 'cross_entropy', got '", name, "'");
  return Kind::cross_entropy;
}

template <typename T>
void row_losses(const Tensor& logits, const int64_t* labels, double smoothing, Tensor& losses, T* gradient) {
  using A = Acc<T>;
  const PredictionLoops<T>& loops = chosen_loops<PredictionLoops<T>>();
  const int64_t episodes = losses.size(0), n = logits.size(-2), classes = logits.size(-1), rows = episodes * n;
  const T* in = static_cast<const T*>(logits.const_data_ptr());
  const A share = A(1) / static_cast<A>(n);
  std::vector<A> values(rows);
  // Labels are checked here, because no exception may leave a thread.
  for (int64_t r = 0; labels && r < rows; ++r)
    TORCH_CHECK_INDEX(labels[r] >= 0 && labels[r] < classes, "labels must be from 0 to K - 1 = ", classes - 1, ", got ",
                      labels[r]);
  at::parallel_for(0, rows, rows_per_task(classes), [&](int64_t begin, int64_t end) {
    A* scratch = Scratch::rewound().take<A>(loops.scratch_row(classes));
    for (int64_t r = begin; r < end; ++r) {
      const T* row = in + r * classes;
      T* out = gradient ? gradient + r * classes : nullptr;
      values[r] = labels ? loops.cross_entropy(row, classes, labels[r], static_cast<A>(smoothing), share,
                                               scratch, out)
                         : loops.entropy(row, classes, share, scratch, out);
    }
  });
  A* out = losses.mutable_data_ptr<A>();
  for (int64_t e = 0; e < episodes; ++e) {
    A total = 0;
    for (int64_t r = 0; r < n; ++r) total += values[e * n + r];
    out[e] = total * share;
  }
}

template <typename T>
void marginal_losses(const Tensor& logits, Tensor& losses, T* gradient) {
  using A = Acc<T>;
  const PredictionLoops<T>& loops = chosen_loops<PredictionLoops<T>>();
  const int64_t n = logits.size(-2), classes = logits.size(-1), size = n * classes;
  const T* in = static_cast<const T*>(logits.const_data_ptr());
  A* out = losses.mutable_data_ptr<A>();
  at::parallel_for(0, losses.size(0), rows_per_task(size), [&](int64_t begin, int64_t end) {
    A* scratch = Scratch::rewound().take<A>(loops.scratch_marginal(n, classes));
    for (int64_t e = begin; e < end; ++e)
      out[e] = loops.marginal(in + e * size, n, classes, scratch, gradient ? gradient + e * size : nullptr);
  });
}

std::tuple<Tensor, Tensor> prediction_loss(const Tensor& logits_, c10::string_view name,
                                           const std::optional<Tensor>& labels_, double smoothing, bool keep) {
  const Kind kind = kind_named(name);
  const int64_t axes = logits_.dim();
  TORCH_CHECK((axes == 2 || axes == 3) && logits_.size(-2) > 0 && logits_.size(-1) > 0,
              "logits must be (E, n, K) or (n, K) with n >= 1 and K >= 1, got ", logits_.sizes());
  TORCH_CHECK(labels_.has_value() == (kind == Kind::cross_entropy), "labels belong to kind 'cross_entropy' alone");
  const Tensor logits = logits_.contiguous();
  Tensor labels;
  if (labels_) {
    TORCH_CHECK(labels_->sizes() == logits.sizes().slice(0, axes - 1) && labels_->scalar_type() == at::kLong &&
                    labels_->device() == logits.device(),
                "labels must be (E, n) or (n,) int64 beside the logits, got ", labels_->sizes());
    labels = labels_->contiguous();
  }
  Tensor losses = at::empty({axes == 3 ? logits.size(0) : 1}, logits.options().dtype(exact_type(logits)));
  Tensor dlogits = keep ? at::empty_like(logits) : at::empty({0}, logits.options());
  with_loop_type(logits, [&]<typename T>() {
    T* gradient = keep ? static_cast<T*>(dlogits.mutable_data_ptr()) : nullptr;
    if (kind == Kind::marginal)
      marginal_losses<T>(logits, losses, gradient);
    else
      row_losses<T>(logits, labels_ ? labels.const_data_ptr<int64_t>() : nullptr, smoothing, losses, gradient);
  });
  return {losses, dlogits};
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("prediction_loss", &prediction_loss); }

}  // namespace rada_fast
