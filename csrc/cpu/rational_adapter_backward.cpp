// The whole adapter's backward pass. It goes from the logits back to the rational matrix for one chunk of images after
// another, and ends with the gradients that all images share.
#include <torch/library.h>

#include "class_tiles.h"
#include "rational_adapter.h"

namespace rada_fast {
namespace {

// Flags of the gradients that are asked for, in the order of the schema.
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
Tensor transposed(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), strip = 64;
  Tensor out = at::empty({columns, rows}, matrix.options());
  at::parallel_for(0, divide_up(rows, strip), 1, [&](int64_t begin, int64_t end) {
    const int64_t r0 = begin * strip, r1 = std::min(end * strip, rows);
    chosen_loops<AdapterLoops<T>>().transpose(data<T>(matrix) + r0 * columns, columns, r1 - r0, columns, data<T>(out) + r0, rows);
  });
  return out;
}

// The gradients of the outputs. dlogits is multiplied by s; dpenalty is the part of the penalty's gradient that one
// element (l2, l1) or one image (linf) receives.
struct UpstreamGradients {
  Tensor dlogits, dmask;
  double dpenalty;
};

template <typename T>
class AdapterBackward {
 public:
  AdapterBackward(const Arguments& arguments, const Saved& saved_, const Tensor& peak_, const Needed& needed_,
                  UpstreamGradients upstream_)
      : in(arguments), saved(saved_), peak(peak_), needed(needed_), upstream(std::move(upstream_)) {
    allocate_results();
    allocate_buffers();
  }

  BackwardResult run() {
    for (int64_t first = 0; first < p.batch; first += step) {
      const int64_t images = std::min(step, p.batch - first);
      const AttentionState<T> state = state_of<T>(p, saved, first);
      output(first, images, state);
      if (need_attention) attention(first, images, state);
      projections(first, images);
    }
    if (p.batch > 0) shared_text_query();
    image_query();
    return results();
  }

 private:
  using A = Acc<T>;
  using F = Factor<T>;
  const Arguments& in;
  const Saved& saved;
  const Tensor& peak;
  const Needed& needed;
  const UpstreamGradients upstream;
  const Problem p = problem_of(in);
  const Operands<T> operands{p, in, !needed.features()};
  const int64_t step = chunk_of(p);
  const at::TensorOptions exact = in.image_features.options().dtype(Types<T>::exact);
  const at::TensorOptions factor = exact.dtype(Types<T>::factor);

  // The features' gradients come through every projection.
  const bool features = needed.features();
  const bool need_image = p.image && (needed.role(kImage) || needed.image_features);
  const bool need_text = p.text && (needed.role(kText) || needed.text_features);
  const bool need_rational = p.rational && (needed.role(kRational) || features);
  const bool need_keys = needed.role(kKey) || features, need_values = needed.role(kValue) || features;
  const bool need_attention = need_image || need_text || need_rational || need_keys || need_values;
  // A single class has the probability 1 whatever its score, so the scores' gradients are set to zero: computed, they
  // would be rounding noise.
  const bool single_class = p.classes == 1;

  // The results over all images.
  std::array<Tensor, kRoles> dweights, dbiases;
  Tensor dimage, dtext;  // (B, D), (D, padded)
  Tensor dtext_query;    // (D, padded)
  Tensor dimage_query;   // (B, D)
  // The transposed weights, (D, D), where a gradient goes through them.
  std::array<Tensor, kRoles> transposed_weights;
  // The buffers of a chunk, (images, D, padded), undefined where they are not needed. `attended` is an operand with a row
  // for each image and class.
  Tensor doffset, attended, dattended, weighted, dkeys, dvalues, drational_query, dtext_queries;

  void allocate_results() {
    for (size_t role = 0; role < kRoles; ++role) {
      // The first product writes dweights; without images there is no product.
      if (needed.weights[role])
        dweights[role] = p.batch > 0 ? at::empty({p.width, p.width}, exact) : at::zeros({p.width, p.width}, exact);
      if (needed.biases[role]) dbiases[role] = at::zeros({p.width}, exact);
      if (in.weights[role] && (features || (role == kOutput && need_attention)))
        transposed_weights[role] = transposed<F>(operands.weights[role]);
    }
    if (need_text) dtext_query = at::zeros({p.width, p.padded}, exact);
    if (need_image) dimage_query = at::zeros({p.batch, p.width}, exact);
    if (features) {
      dimage = at::zeros({p.batch, p.width}, exact);
      dtext = at::zeros({p.width, p.padded}, exact);
    }
  }

  void allocate_buffers() {
    const auto buffer = [&](bool wanted, const at::TensorOptions& type) {
      const std::array<int64_t, 3> shape{step, p.width, p.padded};
      return !wanted ? Tensor() : single_class ? at::zeros(shape, type) : at::empty(shape, type);
    };
    doffset = buffer(needed.role(kOutput), factor);
    if (needed.weights[kOutput]) attended = at::empty({step, p.padded, spread(p.width)}, factor);
    dattended = buffer(need_attention, factor);
    weighted = buffer(features, exact);
    dkeys = buffer(need_keys, factor);
    dvalues = buffer(need_values, factor);
    drational_query = buffer(need_rational, factor);
    dtext_queries = buffer(need_text, exact);
  }

  // Goes back from the logits, the mask and the penalty to the output projection and to the attention's result.
  void output(int64_t first, int64_t images, const AttentionState<T>& state) {
    const int64_t masks = first * p.width * p.classes;
    const OutputGradients<F> gradients{data<A>(upstream.dlogits) + first * p.classes,
                                       upstream.dmask.defined() ? data<A>(upstream.dmask) + masks : nullptr,
                                       data<int64_t>(peak) + first,
                                       p.keeps_offset() ? data<A>(saved.offset) + first * p.image_size() : nullptr,
                                       static_cast<A>(upstream.dpenalty),
                                       data<F>(doffset),
                                       data<F>(attended),
                                       data<F>(transposed_weights[kOutput]),
                                       data<F>(dattended),
                                       data<A>(weighted)};
    masked_logits_backward<F>(p, images, operands.output(in, first, p.width), state, gradients);
    if (needed.role(kOutput))
      output_weight_gradients<F>(p, images, data<F>(doffset), data<F>(attended), data<A>(dweights[kOutput]),
                                 data<A>(dbiases[kOutput]), first > 0);
  }

  // Goes back to the queries, keys and values. All images share the text query, so their gradients are added up in order.
  void attention(int64_t first, int64_t images, const AttentionState<T>& state) {
    AttentionGradients<T> gradients{};
    gradients.doutput = data<F>(dattended);
    gradients.dvalues = data<F>(dvalues);
    if (!single_class) {
      gradients.dkeys = data<F>(dkeys);
      gradients.drational_query = data<F>(drational_query);
      gradients.dtext_query = data<A>(dtext_queries);
      gradients.dimage_query = need_image ? data<A>(dimage_query) + first * p.width : nullptr;
    }
    class_attention_backward<T>(p, images, state, gradients);
    if (!need_text) return;
    const int64_t size = p.image_size();
    A *to = data<A>(dtext_query), *from = data<A>(dtext_queries);
    at::parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < images; ++b)
        for (int64_t i = begin; i < end; ++i) to[i] += from[b * size + i];
    });
  }

  // Goes back to the projections' weights, and through them to the rational matrix and the features.
  void projections(int64_t first, int64_t images) {
    const A* image = data<A>(operands.image) + first * p.width;
    std::array<ProjectionGradient<F>, 3> gradients{};
    int64_t count = 0;
    const auto add = [&](Role role, const Tensor& gradient) {
      if (needed.role(role))
        gradients[count++] = {data<F>(gradient), data<A>(dweights[role]), data<A>(dbiases[role]), first > 0};
    };
    add(kKey, dkeys);
    // A row's probabilities do not change when all keys shift by the same vector. The key's bias therefore has a
    // gradient of zero, and rounding must not change that.
    if (needed.role(kKey) && (!p.matrix_softmax || p.per_class_kinds() == 0)) gradients[0].dbias = nullptr;
    add(kValue, dvalues);
    if (p.rational) add(kRational, drational_query);
    rational_projection_gradients<F>(p, images, image, data<A>(operands.text_rows), gradients.data(), count);
    if (!features) return;
    const std::array<const F*, 3> weights{data<F>(transposed_weights[kKey]), data<F>(transposed_weights[kValue]),
                                          data<F>(transposed_weights[kRational])};
    const std::array<const F*, 3> outputs{data<F>(dkeys), data<F>(dvalues), data<F>(drational_query)};
    rational_matrix_gradients<F>(p, images, image, data<A>(operands.text), weights.data(), outputs.data(),
                                 2 + p.rational, data<A>(weighted), data<A>(dimage) + first * p.width, data<A>(dtext));
  }

  // The text query is the projection for one image of ones; see the forward pass.
  void shared_text_query() {
    if (!needed.role(kText)) return;
    Problem shared = p;
    shared.rational_scale = p.query_scale;
    const Tensor rounded = dtext_query.to(Types<T>::factor);
    const ProjectionGradient<F> gradient{data<F>(rounded), data<A>(dweights[kText]), data<A>(dbiases[kText]), false};
    rational_projection_gradients<F>(shared, 1, data<A>(operands.ones), data<A>(operands.text_rows), &gradient, 1);
  }

  void image_query() {
    if (needed.weights[kImage] && p.batch > 0) {
      const Tensor scaled = dimage_query.mul(p.query_scale);
      // A product of depth 1 is an outer product, for which the matrix product is slow.
      if (p.batch == 1)
        at::mul_out(dweights[kImage], scaled.t(), operands.image);
      else
        at::mm_out(dweights[kImage], scaled.t(), operands.image);
    }
    if (needed.biases[kImage]) dbiases[kImage] = dimage_query.sum(0);
  }

  BackwardResult results() {
    if (needed.image_features && p.image)
      dimage.add_(dimage_query.mm(operands.weights[kImage].to(Types<T>::exact)), p.query_scale);
    if (needed.text_features && p.text)
      dtext.add_(transposed_weights[kText].to(Types<T>::exact).mm(dtext_query), p.query_scale);
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
};

template <typename T>
UpstreamGradients upstream_of(const Arguments& in, const OptionalTensor& dlogits, const OptionalTensor& dpenalty,
                              const OptionalTensor& dmask) {
  const auto exact = in.image_features.options().dtype(Types<T>::exact);
  const int64_t batch = in.image_features.size(0), width = in.image_features.size(1), classes = in.text_features.size(0);
  const double elements = in.penalty == Penalty::linf ? 1.0 : static_cast<double>(classes * width);
  const bool has_penalty = dpenalty && in.penalty != Penalty::none && batch > 0;
  return {dlogits ? dlogits->to(Types<T>::exact).mul(in.logit_scale.item<double>()).contiguous()
                  : at::zeros({batch, classes}, exact),
          dmask ? dmask->to(Types<T>::exact).contiguous() : Tensor(),
          has_penalty ? dpenalty->item<double>() / (static_cast<double>(batch) * elements) : 0.0};
}

BackwardResult rational_adapter_backward(
    const OptionalTensor& dlogits, const OptionalTensor& dpenalty, const OptionalTensor& dmask,
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale, const OptionalTensor& wi,
    const OptionalTensor& bi, const OptionalTensor& wt, const OptionalTensor& bt, const OptionalTensor& wr,
    const OptionalTensor& br, const Tensor& wk, const OptionalTensor& bk, const Tensor& wv, const OptionalTensor& bv,
    const Tensor& wo, const OptionalTensor& bo, int64_t num_heads, double temperature, bool matrix_softmax,
    double input_scale_factor, bool relu, c10::string_view penalty, bool widened, bool output_is_zero,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, double, const Tensor& projections, const Tensor& attended, const Tensor& factors,
    const Tensor& statistics, const Tensor& image_state, const Tensor& text_query, const Tensor& offset, const Tensor& peak,
    c10::List<bool> needed) {
  const Arguments in{image_features, text_features, logit_scale, {wi, wt, wr, wk, wv, wo}, {bi, bt, br, bk, bv, bo},
                     num_heads, temperature, matrix_softmax, input_scale_factor, relu, penalty_named(penalty), widened,
                     output_is_zero, {}};
  const Saved saved{projections, attended, factors, statistics, image_state, text_query, offset};
  c10::SmallVector<bool, 16> flags(needed.begin(), needed.end());
  const Needed asked{at::ArrayRef<bool>(flags.data(), flags.size())};
  return with_stored_type(in, [&]<typename T>() {
    return AdapterBackward<T>(in, saved, peak, asked, upstream_of<T>(in, dlogits, dpenalty, dmask)).run();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) {
  library.impl("rational_adapter_backward", &rational_adapter_backward);
}

}  // namespace rada_fast
