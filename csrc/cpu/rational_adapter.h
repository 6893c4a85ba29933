// The parts that the whole adapter's forward and backward pass on the CPU share. Both work on chunks of images, so the
// arrays that are not kept for the backward pass stay small.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <optional>

#include "class_attention.h"
#include "masked_logits.h"
#include "rational_projections.h"

namespace rada_fast {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum Role : size_t { kImage, kText, kRational, kKey, kValue, kOutput, kRoles };

// What an earlier forward pass with the same features has kept (see Saved), and by which factor the projections are larger
// now. The forward pass then computes no projections, and no attention either where the factor is 1.
struct Given {
  OptionalTensor projections, attended, factors, statistics, image_state, text_query;
  double scale;

  bool some() const { return projections.has_value(); }
  bool all() const { return some() && scale == 1; }
};

// The arguments of the operators' schemas (csrc/ops.cpp).
struct Arguments {
  const Tensor &image_features, &text_features, &logit_scale;
  std::array<OptionalTensor, kRoles> weights, biases;
  int64_t num_heads;
  double temperature;
  bool matrix_softmax;
  double input_scale_factor;
  bool relu;
  Penalty penalty;
  bool widened, output_is_zero;
  Given given;
};

Penalty penalty_named(c10::string_view name);
// forward_only: whether nothing is computed from what the attention keeps, neither gradients nor a later forward pass.
Problem problem_of(const Arguments& in, bool forward_only = false);
// The number of images per chunk: it gives enough rows for the products and enough heads for the threads.
int64_t chunk_of(const Problem& p);

// Calls body.template operator()<T>() with the type in which the parameters are stored and multiplied.
template <typename Body>
auto with_stored_type(const Arguments& in, const Body& body) {
  const at::ScalarType type = in.weights[kOutput]->scalar_type();
  switch (type) {
    case at::kFloat: return body.template operator()<float>();
    case at::kDouble: return body.template operator()<double>();
    case at::kBFloat16: return in.widened ? body.template operator()<WideBF16>() : body.template operator()<BF16>();
    default: TORCH_CHECK(false, "parameters must be float32, float64 or bfloat16, got ", type);
  }
}

template <typename T>
struct Types {
  static constexpr at::ScalarType stored = sizeof(T) == 2 ? at::kBFloat16 : (sizeof(T) == 4 ? at::kFloat : at::kDouble);
  static constexpr at::ScalarType factor = sizeof(Factor<T>) == 4 ? at::kFloat : stored;
  static constexpr at::ScalarType exact = sizeof(T) == 8 ? at::kDouble : at::kFloat;
};

// Returns the tensor's memory, or null for an undefined or empty tensor.
template <typename X>
X* data(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() ? reinterpret_cast<X*>(tensor.data_ptr()) : nullptr;
}

// The inputs in the types and layouts that the kernels take.
template <typename T>
struct Operands {
  using A = Acc<T>;
  using F = Factor<T>;
  Tensor image, text_rows, text, ones;
  std::array<Tensor, kRoles> weights, biases;

  // output_only: convert only the output projection's weight; widening a weight costs as much as a small product.
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
  OutputInputs<F> output(const Arguments& in, int64_t first, int64_t width) const {
    return {data<A>(image) + first * width, data<A>(text), in.output_is_zero ? nullptr : data<F>(weights[kOutput]),
            data<A>(biases[kOutput])};
  }
};

// The tensors that the forward pass keeps for the backward pass. The axis of images comes before all axes whose values
// differ between images, so a chunk of images is contiguous.
struct Saved {
  Tensor projections;  // (keys, values[, rational query]; images, D, padded)
  Tensor attended;     // (kinds with a query per class, or 1 if they are merged; images, D, padded)
  Tensor factors;      // (2, images, H, blocks)
  Tensor statistics;   // (2 kinds, 2, images, H, padded or 1): maxima, weights
  Tensor image_state;  // (2, images, D): queries, attended rows
  Tensor text_query;   // (D, padded)
  Tensor offset;       // A without its bias, (images, D, padded), or without images where it is computed again
};

// Returns the part of `saved` that belongs to the images from `first` on.
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
  for (int64_t kind = 0; kind < p.per_class_kinds(); ++kind) {
    state.attended[kind] = kind < p.attended_kinds() ? data<A>(saved.attended) + kind * size + at : nullptr;
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

}  // namespace rada_fast
