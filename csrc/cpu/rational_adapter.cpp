// The whole adapter: forward and backward in chunks of images, so that what is not kept stays small.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <string>

#include "class_attention.h"
#include "masked_logits.h"
#include "matrix_product.h"
#include "rational_projections.h"

namespace rada_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Role : size_t { kImage, kText, kRational, kKey, kValue, kOutput, kRoles };

struct Arguments {
  const Tensor &image_features, &text_features, &logit_scale;
  std::array<OptionalTensor, kRoles> weights, biases;
  int64_t num_heads;
  double temperature;
  bool matrix_softmax;
  double input_scale_factor;
  bool relu;
  Penalty penalty;
  bool widened;  // bfloat16 is multiplied as float32
};

Penalty penalty_named(c10::string_view name) {
  if (name == "none") return Penalty::none;
  if (name == "l2") return Penalty::l2;
  if (name == "l1") return Penalty::l1;
  TORCH_CHECK(name == "linf", "penalty must be one of 'none', 'l2', 'l1', 'linf', got '", name, "'");
  return Penalty::linf;
}

Problem problem_of(const Arguments& in) {
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

// Images per chunk: enough rows for the products and enough heads for the threads.
int64_t chunk_of(const Problem& p) {
  const int64_t rows = divide_up(2048, p.classes), work = divide_up(4 * p.threads, p.heads);
  return std::clamp<int64_t>(std::max(rows, work), 1, std::max<int64_t>(p.batch, 1));
}

template <typename T>
struct Types {
  static constexpr at::ScalarType stored = sizeof(T) == 2 ? at::kBFloat16 : (sizeof(T) == 4 ? at::kFloat : at::kDouble);
  static constexpr at::ScalarType factor = sizeof(Factor<T>) == 4 ? at::kFloat : stored;
  static constexpr at::ScalarType exact = sizeof(T) == 8 ? at::kDouble : at::kFloat;
};

template <typename X>
X* data(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? reinterpret_cast<X*>(tensor.data_ptr()) : nullptr;
}

template <typename T>
Tensor transpose(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), strip = 64;
  Tensor out = at::empty({columns, rows}, matrix.options());
  at::parallel_for(0, divide_up(rows, strip), 1, [&](int64_t begin, int64_t end) {
    const int64_t r0 = begin * strip, r1 = std::min(end * strip, rows);
    chosen_loops<AdapterLoops<T>>().transpose(data<T>(matrix) + r0 * columns, columns, r1 - r0, columns, data<T>(out) + r0, rows);
  });
  return out;
}

// The inputs as the kernels want them.
template <typename T>
struct Operands {
  using A = Acc<T>;
  using F = Factor<T>;
  Tensor image, text_rows, text, ones;
  std::array<Tensor, kRoles> weights, biases;

  // output_only: of the weights, only the output's; widening one costs as much as a small product.
  Operands(const Problem& p, const Arguments& in, bool output_only = false) {
    image = in.image_features.to(Types<T>::exact).contiguous();
    text_rows = in.text_features.to(Types<T>::exact).contiguous();
    text = at::zeros({p.width, p.padded}, text_rows.options());
    text.narrow(1, 0, p.classes).copy_(text_rows.t());
    ones = at::ones({p.width}, text_rows.options());
    for (size_t role = 0; role < kRoles; ++role) {
      if (in.weights[role] && (role == kOutput || !output_only))
        weights[role] = in.weights[role]->to(Types<T>::factor).contiguous();
      if (in.biases[role]) biases[role] = in.biases[role]->to(Types<T>::exact).contiguous();
    }
  }

  Projection<T> projection(Role role, T* out) const { return {data<F>(weights[role]), data<A>(biases[role]), out}; }
  OutputInputs<F> output(int64_t first, int64_t width) const {
    return {data<A>(image) + first * width, data<A>(text), data<F>(weights[kOutput]), data<A>(biases[kOutput])};
  }
};

// What the forward leaves for the backward; image-major, so that a chunk of images is one piece of each.
struct Saved {
  Tensor projections;  // (keys, values[, rational query]; images, D, padded)
  Tensor attended;     // (wide kinds, images, D, padded)
  Tensor factors;      // (2, images, H, blocks)
  Tensor statistics;   // (2 kinds, 2, images, H, padded or 1): maxima, weights
  Tensor image_state;  // (2, images, D): queries, attended rows
  Tensor text_query;   // (D, padded)
};

template <typename T>
Saved allocate(const Problem& p, int64_t images, const at::TensorOptions& options) {
  const auto stored = options.dtype(Types<T>::stored), exact = options.dtype(Types<T>::exact);
  return {at::empty({2 + int64_t(p.rational), images, p.width, p.padded}, stored),
          at::empty({p.wide_kinds(), images, p.width, p.padded}, exact),
          at::empty({2, images, p.heads, p.query_blocks}, exact),
          at::empty({2, 2, images, p.heads, p.matrix_softmax ? 1 : p.padded}, exact),
          at::empty({2, images, p.image ? p.width : 0}, exact),
          at::empty({p.text ? p.width : 0, p.padded}, stored)};
}

template <typename T>
AttentionState<T> state_of(const Problem& p, const Saved& saved, int64_t first) {
  using A = Acc<T>;
  const int64_t images = saved.projections.size(1), size = images * p.image_size(), at = first * p.image_size();
  T* projections = data<T>(saved.projections);
  AttentionState<T> state{};
  state.keys = projections + at;
  state.values = projections + size + at;
  state.rational_query = p.rational ? projections + 2 * size + at : nullptr;
  state.text_query = p.text ? data<T>(saved.text_query) : nullptr;
  for (int64_t kind = 0; kind < p.wide_kinds(); ++kind) {
    state.attended[kind] = data<A>(saved.attended) + kind * size + at;
    state.factors[kind] = data<A>(saved.factors) + (kind * images + first) * p.heads * p.query_blocks;
    const int64_t row = p.heads * (p.matrix_softmax ? 1 : p.padded);
    state.maxima[kind] = data<A>(saved.statistics) + (2 * kind * images + first) * row;
    state.weights[kind] = state.maxima[kind] + images * row;
  }
  if (p.image) {
    A* queries = data<A>(saved.image_state);
    state.image_query = queries + first * p.width;
    state.image_attended = queries + (images + first) * p.width;
  }
  return state;
}

using ForwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
ForwardResult forward_of(const Arguments& in, bool return_mask, bool keep) {
  using A = Acc<T>;
  using F = Factor<T>;
  const Problem p = problem_of(in);
  const Operands<T> operands(p, in);
  const auto options = in.image_features.options();
  const int64_t chunk = keep ? p.batch : chunk_of(p), step = chunk_of(p);
  Saved saved = allocate<T>(p, chunk, options);
  // Without the factor s, whose gradient they are.
  Tensor sums = at::empty({p.batch, p.classes}, options.dtype(Types<T>::exact));
  Tensor mask = return_mask ? at::empty({p.batch, p.width, p.classes}, sums.options()) : at::empty({0}, options);
  Tensor penalties = at::zeros({p.batch}, options.dtype(at::kDouble));
  Tensor peak = at::zeros({p.batch}, options.dtype(at::kLong));

  if (p.text) {
    // One "image" of ones: the text query is the same product, without f.
    Problem shared = p;
    shared.rational_scale = p.query_scale;
    const auto projection = operands.projection(kText, data<T>(saved.text_query));
    rational_projections<T>(shared, 1, data<A>(operands.ones), data<A>(operands.text), &projection, 1);
  }
  Tensor image_query;
  if (p.image)
    image_query = at::linear((operands.image * p.query_scale).to(Types<T>::factor), operands.weights[kImage],
                             in.biases[kImage] ? in.biases[kImage]->to(Types<T>::factor) : OptionalTensor())
                      .to(Types<T>::exact).contiguous();

  for (int64_t first = 0; first < p.batch; first += step) {
    const int64_t images = std::min(step, p.batch - first);
    const AttentionState<T> state = state_of<T>(p, saved, keep ? first : 0);
    const std::array<Projection<T>, 3> projections{operands.projection(kKey, const_cast<T*>(state.keys)),
                                                   operands.projection(kValue, const_cast<T*>(state.values)),
                                                   operands.projection(kRational, const_cast<T*>(state.rational_query))};
    rational_projections<T>(p, images, data<A>(operands.image) + first * p.width, data<A>(operands.text),
                            projections.data(), 2 + p.rational);
    if (p.image)
      std::copy_n(data<A>(image_query) + first * p.width, images * p.width, const_cast<A*>(state.image_query));
    class_attention_forward<T>(p, images, state);
    masked_logits_forward<F>(p, images, operands.output(first, p.width), state, data<A>(sums) + first * p.classes,
                             data<double>(penalties) + first, data<int64_t>(peak) + first,
                             return_mask ? data<A>(mask) + first * p.width * p.classes : nullptr);
  }

  const auto features = in.image_features.scalar_type();
  const double elements = static_cast<double>(std::max<int64_t>(p.batch, 1)) *
                          (p.penalty == Penalty::linf ? 1.0 : static_cast<double>(p.classes * p.width));
  if (!keep) saved = allocate<T>(Problem{}, 0, options);
  return {sums.mul(p.logit_scale).to(features), (penalties.sum() / elements).to(features), mask.to(features),
          saved.projections, saved.attended, saved.factors, saved.statistics, saved.image_state, saved.text_query, peak, sums};
}

// Which gradients are asked for, in the order of the schema.
struct Needed {
  bool image_features, text_features;
  std::array<bool, kRoles> weights, biases;
  explicit Needed(at::ArrayRef<bool> flags) {
    TORCH_CHECK(flags.size() == 2 + 2 * kRoles, "needed must hold ", 2 + 2 * kRoles, " flags");
    image_features = flags[0];
    text_features = flags[1];
    for (size_t role = 0; role < kRoles; ++role) {
      weights[role] = flags[2 + 2 * role];
      biases[role] = flags[3 + 2 * role];
    }
  }
  bool features() const { return image_features || text_features; }
  bool role(Role r) const { return weights[r] || biases[r]; }
};

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor>;

template <typename T>
BackwardResult backward_of(const OptionalTensor& dlogits_in, const OptionalTensor& dpenalty_in,
                           const OptionalTensor& dmask_in, const Arguments& in, const Saved& saved, const Tensor& peak,
                           const Needed& needed) {
  using A = Acc<T>;
  using F = Factor<T>;
  const Problem p = problem_of(in);
  const Operands<T> operands(p, in, !needed.features());
  const auto exact = in.image_features.options().dtype(Types<T>::exact), factor = exact.dtype(Types<T>::factor);
  const int64_t step = chunk_of(p), size = p.image_size();

  const Tensor dlogits = dlogits_in ? dlogits_in->to(Types<T>::exact).mul(p.logit_scale).contiguous()
                                    : at::zeros({p.batch, p.classes}, exact);
  const Tensor dmask = dmask_in ? dmask_in->to(Types<T>::exact).contiguous() : Tensor();
  const double share = p.penalty == Penalty::linf ? 1.0 : static_cast<double>(p.classes * p.width);
  const double dpenalty = dpenalty_in && p.penalty != Penalty::none && p.batch > 0
                              ? dpenalty_in->item<double>() / (static_cast<double>(p.batch) * share)
                              : 0.0;

  std::array<Tensor, kRoles> dweights, dbiases, transposed;
  for (size_t role = 0; role < kRoles; ++role) {
    // Written by the first product; without images there is none.
    if (needed.weights[role])
      dweights[role] = p.batch > 0 ? at::empty({p.width, p.width}, exact) : at::zeros({p.width, p.width}, exact);
    if (needed.biases[role]) dbiases[role] = at::zeros({p.width}, exact);
    // The features' gradients come through every projection.
    if (in.weights[role] && (needed.features() || role == kOutput))
      transposed[role] = transpose<F>(operands.weights[role]);
  }
  const bool features = needed.features(), need_image = p.image && (needed.role(kImage) || needed.image_features);
  const bool need_text = p.text && (needed.role(kText) || needed.text_features);
  const bool need_rational = p.rational && (needed.role(kRational) || features);
  const bool need_keys = needed.role(kKey) || features, need_values = needed.role(kValue) || features;
  // A single class has a probability of 1 whatever its score: the scores' gradients are zeros, not rounding noise.
  const bool alone = p.classes == 1;
  const bool attention = need_image || need_text || need_rational || need_keys || need_values;

  const auto buffer = [&](bool wanted, const at::TensorOptions& type) {
    const std::array<int64_t, 3> shape{step, p.width, p.padded};
    return !wanted ? Tensor() : alone ? at::zeros(shape, type) : at::empty(shape, type);
  };
  const Tensor doffset = buffer(needed.role(kOutput), factor), attended = buffer(needed.weights[kOutput], factor);
  const Tensor dattended = buffer(attention, factor), weighted = buffer(features, exact);
  const Tensor dkeys = buffer(need_keys, factor), dvalues = buffer(need_values, factor);
  const Tensor drational = buffer(need_rational, factor), dtext_queries = buffer(need_text, exact);
  const Tensor dtext_query = need_text ? at::zeros({p.width, p.padded}, exact) : Tensor();
  const Tensor dimage_query = need_image ? at::zeros({p.batch, p.width}, exact) : Tensor();
  Tensor dimage = features ? at::zeros({p.batch, p.width}, exact) : Tensor();
  Tensor dtext = features ? at::zeros({p.width, p.padded}, exact) : Tensor();

  for (int64_t first = 0; first < p.batch; first += step) {
    const int64_t images = std::min(step, p.batch - first);
    const AttentionState<T> state = state_of<T>(p, saved, first);
    const A* image = data<A>(operands.image) + first * p.width;
    const OutputGradients<F> output{data<A>(dlogits) + first * p.classes,
                                    dmask.defined() ? data<A>(dmask) + first * p.width * p.classes : nullptr,
                                    data<int64_t>(peak) + first, static_cast<A>(dpenalty), data<F>(doffset),
                                    data<F>(attended), data<F>(transposed[kOutput]), data<F>(dattended),
                                    data<A>(weighted)};
    masked_logits_backward<F>(p, images, operands.output(first, p.width), state, output);
    if (needed.role(kOutput))
      output_weight_gradients<F>(p, images, data<F>(doffset), data<F>(attended), data<A>(dweights[kOutput]),
                                 data<A>(dbiases[kOutput]), first > 0);
    if (attention) {
      AttentionGradients<T> gradients{data<F>(dattended), nullptr, data<F>(dvalues), nullptr, nullptr, nullptr};
      if (!alone) {
        gradients.dkeys = data<F>(dkeys);
        gradients.drational_query = data<F>(drational);
        gradients.dtext_query = data<A>(dtext_queries);
        gradients.dimage_query = need_image ? data<A>(dimage_query) + first * p.width : nullptr;
      }
      class_attention_backward<T>(p, images, state, gradients);
    }
    if (need_text) {
      A *to = data<A>(dtext_query), *from = data<A>(dtext_queries);
      at::parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
        for (int64_t b = 0; b < images; ++b)
          for (int64_t i = begin; i < end; ++i) to[i] += from[b * size + i];
      });
    }
    std::array<ProjectionGradient<F>, 3> projections{};
    int64_t count = 0;
    const auto add = [&](Role role, const Tensor& gradient) {
      if (needed.role(role))
        projections[count++] = {data<F>(gradient), data<A>(dweights[role]), data<A>(dbiases[role]), first > 0};
    };
    add(kKey, dkeys);
    // A row's probabilities do not see a shift of all keys: this bias has no gradient, and rounding shall not give one.
    if (needed.role(kKey) && (!p.matrix_softmax || p.wide_kinds() == 0)) projections[0].dbias = nullptr;
    add(kValue, dvalues);
    if (p.rational) add(kRational, drational);
    rational_projection_gradients<F>(p, images, image, data<A>(operands.text_rows), projections.data(), count);
    if (features) {
      const std::array<const F*, 3> turned{data<F>(transposed[kKey]), data<F>(transposed[kValue]),
                                           data<F>(transposed[kRational])};
      const std::array<const F*, 3> through{data<F>(dkeys), data<F>(dvalues), data<F>(drational)};
      rational_matrix_gradients<F>(p, images, image, data<A>(operands.text), turned.data(), through.data(),
                                   2 + p.rational, data<A>(weighted), data<A>(dimage) + first * p.width,
                                   data<A>(dtext));
    }
  }

  if (needed.role(kText) && p.batch > 0) {
    Problem shared = p;
    shared.rational_scale = p.query_scale;
    const Tensor rounded = dtext_query.to(Types<T>::factor);
    const ProjectionGradient<F> gradient{data<F>(rounded), data<A>(dweights[kText]), data<A>(dbiases[kText]), false};
    rational_projection_gradients<F>(shared, 1, data<A>(operands.ones), data<A>(operands.text_rows), &gradient, 1);
  }
  if (needed.weights[kImage] && p.batch > 0) {
    const Tensor scaled = dimage_query.mul(p.query_scale);
    // A product of depth 1 is an outer one, which the matrix product does badly.
    if (p.batch == 1)
      at::mul_out(dweights[kImage], scaled.t(), operands.image);
    else
      at::mm_out(dweights[kImage], scaled.t(), operands.image);
  }
  if (needed.biases[kImage]) dbiases[kImage] = dimage_query.sum(0);
  if (needed.image_features && p.image)
    dimage.add_(dimage_query.mm(operands.weights[kImage].to(Types<T>::exact)), p.query_scale);
  if (needed.text_features && p.text)
    dtext.add_(transposed[kText].to(Types<T>::exact).mm(dtext_query), p.query_scale);

  const auto given = [&](const Tensor& gradient, bool wanted, at::ScalarType type) {
    return wanted ? gradient.to(type) : at::empty({0}, exact);
  };
  const auto weight = [&](Role r) { return given(dweights[r], needed.weights[r], Types<T>::stored); };
  const auto bias = [&](Role r) {
    return given(dbiases[r], needed.biases[r], in.biases[r] ? in.biases[r]->scalar_type() : Types<T>::stored);
  };
  if (needed.text_features) dtext = dtext.narrow(1, 0, p.classes).t().contiguous();
  return {given(dimage, needed.image_features, in.image_features.scalar_type()),
          given(dtext, needed.text_features, in.text_features.scalar_type()),
          weight(kImage), bias(kImage), weight(kText), bias(kText), weight(kRational), bias(kRational),
          weight(kKey), bias(kKey), weight(kValue), bias(kValue), weight(kOutput), bias(kOutput)};
}

ForwardResult rational_adapter(const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
                               const OptionalTensor& wi, const OptionalTensor& bi, const OptionalTensor& wt,
                               const OptionalTensor& bt, const OptionalTensor& wr, const OptionalTensor& br,
                               const Tensor& wk, const OptionalTensor& bk, const Tensor& wv, const OptionalTensor& bv,
                               const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double temperature,
                               bool matrix_softmax, double input_scale_factor, bool relu, c10::string_view penalty,
                               bool widened, bool return_mask, bool keep) {
  const Arguments in{image_features, text_features, logit_scale, {wi, wt, wr, wk, wv, wo}, {bi, bt, br, bk, bv, bo},
                     num_heads, temperature, matrix_softmax, input_scale_factor, relu, penalty_named(penalty), widened};
  switch (wo.scalar_type()) {
    case at::kFloat: return forward_of<float>(in, return_mask, keep);
    case at::kDouble: return forward_of<double>(in, return_mask, keep);
    case at::kBFloat16:
      return widened ? forward_of<WideBF16>(in, return_mask, keep) : forward_of<BF16>(in, return_mask, keep);
    default: TORCH_CHECK(false, "parameters must be float32, float64 or bfloat16, got ", wo.scalar_type());
  }
}

BackwardResult rational_adapter_backward(
    const OptionalTensor& dlogits, const OptionalTensor& dpenalty, const OptionalTensor& dmask,
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale, const OptionalTensor& wi,
    const OptionalTensor& bi, const OptionalTensor& wt, const OptionalTensor& bt, const OptionalTensor& wr,
    const OptionalTensor& br, const Tensor& wk, const OptionalTensor& bk, const Tensor& wv, const OptionalTensor& bv,
    const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double temperature, bool matrix_softmax,
    double input_scale_factor, bool relu, c10::string_view penalty, bool widened, const Tensor& projections,
    const Tensor& attended, const Tensor& factors, const Tensor& statistics, const Tensor& image_state, const Tensor& text_query,
    const Tensor& peak, c10::List<bool> needed) {
  const Arguments in{image_features, text_features, logit_scale, {wi, wt, wr, wk, wv, wo}, {bi, bt, br, bk, bv, bo},
                     num_heads, temperature, matrix_softmax, input_scale_factor, relu, penalty_named(penalty), widened};
  const Saved saved{projections, attended, factors, statistics, image_state, text_query};
  c10::SmallVector<bool, 16> flags(needed.begin(), needed.end());
  const Needed asked{at::ArrayRef<bool>(flags.data(), flags.size())};
  switch (wo.scalar_type()) {
    case at::kFloat: return backward_of<float>(dlogits, dpenalty, dmask, in, saved, peak, asked);
    case at::kDouble: return backward_of<double>(dlogits, dpenalty, dmask, in, saved, peak, asked);
    case at::kBFloat16:
      return widened ? backward_of<WideBF16>(dlogits, dpenalty, dmask, in, saved, peak, asked)
                     : backward_of<BF16>(dlogits, dpenalty, dmask, in, saved, peak, asked);
    default: TORCH_CHECK(false, "parameters must be float32, float64 or bfloat16, got ", wo.scalar_type());
  }
}

c10::Dict<std::string, std::string> cpu_paths() {
  c10::Dict<std::string, std::string> paths;
  paths.insert("vectors", level_name());
  paths.insert("float32", has_brgemm_float() ? "oneDNN brgemm" : "BLAS gemm");
  paths.insert("bfloat16", has_brgemm_bfloat16() ? "oneDNN brgemm" : "");
  return paths;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) {
  library.impl("rational_adapter", &rational_adapter);
  library.impl("rational_adapter_backward", &rational_adapter_backward);
}
TORCH_LIBRARY_IMPL(rada_fast, CompositeExplicitAutograd, library) { library.impl("cpu_paths", &cpu_paths); }

}  // namespace rada_fast
