// The whole adapter's forward pass, and the report of how the extension computes on this processor.
#include "rational_adapter.h"

#include <torch/library.h>

#include <cmath>
#include <string>

#include "matrix_product.h"

namespace rada_fast {

Penalty penalty_named(c10::string_view name) {
  if (name == "none") return Penalty::none;
  if (name == "l2") return Penalty::l2;
  if (name == "l1") return Penalty::l1;
  TORCH_CHECK(name == "linf", "penalty must be one of 'none', 'l2', 'l1', 'linf', got '", name, "'");
  return Penalty::linf;
}

Problem problem_of(const Arguments& in, bool forward_only) {
  Problem p{};
  p.batch = in.image_features.size(0);
  p.classes = in.text_features.size(0);
  p.width = in.image_features.size(1);
  p.heads = in.num_heads;
  p.head_width = p.width / p.heads;
  p.padded = round_up(p.classes, 16);
  p.query_blocks = divide_up(p.classes, kQueryBlock);
  p.image = in.weights[kImage].has_value();
  p.text = in.weights[kText].has_value();
  p.rational = in.weights[kRational].has_value();
  p.matrix_softmax = in.matrix_softmax;
  p.relu = in.relu;
  p.merged = (p.matrix_softmax ? forward_only : p.head_width >= kMergedHeadWidth) && p.text && p.rational &&
             p.classes <= kMergedClasses && in.weights[kOutput]->scalar_type() != at::kBFloat16;
  p.penalty = in.penalty;
  p.logit_scale = in.logit_scale.item<double>();
  p.score_scale = 1.0 / (std::sqrt(static_cast<double>(p.head_width)) * in.temperature);
  const double scaled = in.input_scale_factor * p.logit_scale;
  p.rational_scale = in.input_scale_factor == 0 ? 1.0 : scaled;
  p.query_scale = in.input_scale_factor == 0 ? 1.0 : std::sqrt(scaled);
  p.threads = at::get_num_threads();
  TORCH_CHECK(p.classes >= 1 && p.kinds() >= 1 && p.width % p.heads == 0, "the adapter needs a class and a query");
  return p;
}

int64_t chunk_of(const Problem& p) {
  const int64_t rows = divide_up(2048, p.classes), work = divide_up(4 * p.threads, p.heads);
  return std::clamp<int64_t>(std::max(rows, work), 1, std::max<int64_t>(p.batch, 1));
}

namespace {

template <typename T>
Saved allocate(const Problem& p, int64_t images, bool keep_offset, const at::TensorOptions& options) {
  const auto stored = options.dtype(Types<T>::stored), exact = options.dtype(Types<T>::exact);
  return {at::empty({2 + int64_t(p.rational), images, p.width, p.padded}, stored),
          at::empty({p.attended_kinds(), images, p.width, p.padded}, exact),
          at::empty({2, images, p.heads, p.query_blocks}, exact),
          at::empty({2, 2, images, p.heads, p.matrix_softmax ? 1 : p.padded}, exact),
          at::empty({2, images, p.image ? p.width : 0}, exact),
          at::empty({p.text ? p.width : 0, p.padded}, stored),
          at::empty({keep_offset ? images : 0, p.width, p.padded}, exact)};
}

// Copies what an earlier call has kept: an operator must not return its arguments.
void take_all(const Given& given, Saved& saved) {
  saved.projections.copy_(*given.projections);
  saved.attended.copy_(*given.attended);
  saved.factors.copy_(*given.factors);
  saved.statistics.copy_(*given.statistics);
  saved.image_state.copy_(*given.image_state);
  saved.text_query.copy_(*given.text_query);
}

// Returns the queries of the images (B, D). The product is the one of the projections, with the images in place of the
// classes, because its sums do not depend on the number of threads; those of at::linear do.
template <typename T>
Tensor image_query_of(const Problem& p, const Operands<T>& operands) {
  Problem shared = p;
  shared.classes = p.batch;
  shared.padded = round_up(p.batch, 16);
  shared.rational_scale = p.query_scale;
  const Tensor columns = at::zeros({p.width, shared.padded}, operands.image.options());
  columns.narrow(1, 0, p.batch).copy_(operands.image.t());
  const Tensor query = at::empty({p.width, shared.padded}, operands.image.options().dtype(Types<T>::stored));
  const auto projection = operands.projection(kImage, data<T>(query));
  rational_projections<T>(shared, p.batch > 0, data<Acc<T>>(operands.ones), data<Acc<T>>(columns), &projection, 1);
  return query.narrow(1, 0, p.batch).t().to(Types<T>::exact).contiguous();
}

using ForwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Raises an error unless what an earlier call has kept is of this problem's sizes.
void check_given(const Arguments& in) {
  if (!in.given.some()) return;
  const Problem p = problem_of(in);
  const std::array<int64_t, 4> expected{2 + int64_t(p.rational), p.batch, p.width, p.padded};
  const at::IntArrayRef sizes = in.given.projections->sizes(), wanted(expected);
  TORCH_CHECK(sizes == wanted, "projected must be of a call with features of the same shapes, ", wanted, ", got ", sizes);
  TORCH_CHECK(in.given.projections->scalar_type() == in.weights[kOutput]->scalar_type(),
              "projected must be of a call with parameters of the same type");
}

template <typename T>
ForwardResult forward_of(const Arguments& in, bool return_mask, bool keep) {
  using A = Acc<T>;
  using F = Factor<T>;
  const Given& given = in.given;
  const Problem p = problem_of(in, !keep && !given.all());
  const Operands<T> operands(p, in, given.some());
  const auto options = in.image_features.options();
  const bool whole = keep || given.all();  // whether `saved` has all images, or those of one chunk after another
  const int64_t step = chunk_of(p), chunk = whole ? p.batch : step;
  Saved saved = allocate<T>(p, chunk, keep && p.keeps_offset(), options);
  if (given.all()) take_all(given, saved);
  // Results have the same values in every call, those that fill rows up included.
  saved.offset.narrow(2, p.classes, p.padded - p.classes).zero_();
  // The sums are the logits without the factor s, which makes them the derivatives with respect to s.
  Tensor sums = at::empty({p.batch, p.classes}, options.dtype(Types<T>::exact));
  Tensor mask = return_mask ? at::empty({p.batch, p.width, p.classes}, sums.options()) : at::empty({0}, options);
  Tensor penalties = at::zeros({p.batch}, options.dtype(at::kDouble));
  Tensor peak = at::zeros({p.batch}, options.dtype(at::kLong));

  if (given.some()) {
    if (!given.all()) at::mul_out(saved.text_query, *given.text_query, at::scalar_tensor(given.scale, at::kDouble));
  } else if (p.text) {
    // The text query is the same product for one "image" whose features f are all 1.
    Problem shared = p;
    shared.rational_scale = p.query_scale;
    const auto projection = operands.projection(kText, data<T>(saved.text_query));
    rational_projections<T>(shared, 1, data<A>(operands.ones), data<A>(operands.text), &projection, 1);
  }
  Tensor image_query;
  if (p.image && given.some())
    image_query = given.image_state->select(0, 0).mul(given.scale);
  else if (p.image)
    image_query = image_query_of<T>(p, operands);

  for (int64_t first = 0; first < p.batch; first += step) {
    const int64_t images = std::min(step, p.batch - first);
    const AttentionState<T> state = state_of<T>(p, saved, whole ? first : 0);
    if (!given.all()) {
      if (given.some()) {
        Tensor scaled = saved.projections.narrow(1, whole ? first : 0, images);
        at::mul_out(scaled, given.projections->narrow(1, first, images), at::scalar_tensor(given.scale, at::kDouble));
      } else {
        const std::array<Projection<T>, 3> projections{
            operands.projection(kKey, const_cast<T*>(state.keys)), operands.projection(kValue, const_cast<T*>(state.values)),
            operands.projection(kRational, const_cast<T*>(state.rational_query))};
        rational_projections<T>(p, images, data<A>(operands.image) + first * p.width, data<A>(operands.text),
                                projections.data(), 2 + p.rational);
      }
      if (p.image)
        std::copy_n(data<A>(image_query) + first * p.width, images * p.width, const_cast<A*>(state.image_query));
      class_attention_forward<T>(p, images, state);
    }
    masked_logits_forward<F>(p, images, operands.output(in, first, p.width), state, data<A>(sums) + first * p.classes,
                             data<double>(penalties) + first, data<int64_t>(peak) + first,
                             return_mask ? data<A>(mask) + first * p.width * p.classes : nullptr,
                             keep && p.keeps_offset() ? data<A>(saved.offset) + first * p.image_size() : nullptr);
  }

  const auto features = in.image_features.scalar_type();
  const double elements = static_cast<double>(std::max<int64_t>(p.batch, 1)) *
                          (p.penalty == Penalty::linf ? 1.0 : static_cast<double>(p.classes * p.width));
  if (!keep) saved = allocate<T>(Problem{}, 0, false, options);
  return {sums.mul(p.logit_scale).to(features), (penalties.sum() / elements).to(features), mask.to(features),
          saved.projections, saved.attended, saved.factors, saved.statistics, saved.image_state, saved.text_query,
          saved.offset, peak, sums};
}

ForwardResult rational_adapter(const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
                               const OptionalTensor& wi, const OptionalTensor& bi, const OptionalTensor& wt,
                               const OptionalTensor& bt, const OptionalTensor& wr, const OptionalTensor& br,
                               const Tensor& wk, const OptionalTensor& bk, const Tensor& wv, const OptionalTensor& bv,
                               const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double temperature,
                               bool matrix_softmax, double input_scale_factor, bool relu, c10::string_view penalty,
                               bool widened, bool output_is_zero, const OptionalTensor& given_projections,
                               const OptionalTensor& given_attended, const OptionalTensor& given_factors,
                               const OptionalTensor& given_statistics, const OptionalTensor& given_image_state,
                               const OptionalTensor& given_text_query, double given_scale, bool return_mask, bool keep) {
  const Arguments in{image_features, text_features, logit_scale, {wi, wt, wr, wk, wv, wo}, {bi, bt, br, bk, bv, bo},
                     num_heads, temperature, matrix_softmax, input_scale_factor, relu, penalty_named(penalty), widened,
                     output_is_zero, {given_projections, given_attended, given_factors, given_statistics,
                                      given_image_state, given_text_query, given_scale}};
  check_given(in);
  return with_stored_type(in, [&]<typename T>() { return forward_of<T>(in, return_mask, keep); });
}

c10::Dict<std::string, std::string> cpu_paths() {
  c10::Dict<std::string, std::string> paths;
  paths.insert("vectors", level_name());
  paths.insert("float32", has_brgemm_float() ? "oneDNN brgemm" : "BLAS gemm");
  paths.insert("bfloat16", has_brgemm_bfloat16() ? "oneDNN brgemm" : "");
  return paths;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("rational_adapter", &rational_adapter); }
TORCH_LIBRARY_IMPL(rada_fast, CompositeExplicitAutograd, library) { library.impl("cpu_paths", &cpu_paths); }

}  // namespace rada_fast
