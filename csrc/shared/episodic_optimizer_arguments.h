// Checks the arguments of the episodic optimiser's operator and turns them into the kernels' arguments, for ATen's tensors
// and for those of the stable ABI.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "episodic_optimizer.h"

namespace rada_fast {

inline OptimizerScalars optimizer_scalars(OptimizerRule rule, int64_t step, double lr, double weight_decay, double beta1,
                                          double beta2, double eps, double momentum, bool last = false) {
  const bool sgd = rule == OptimizerRule::sgd, decoupled = rule == OptimizerRule::adamw;
  const double t = static_cast<double>(step);
  OptimizerScalars s{};
  s.rule = rule;
  s.decay = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  s.weight_decay = decoupled ? 0.0f : static_cast<float>(weight_decay);
  s.first_weight = static_cast<float>(1 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.second_weight = static_cast<float>(1 - beta2);
  s.root_divisor = static_cast<float>(std::pow(1 - std::pow(beta2, t), 0.5));
  s.eps = static_cast<float>(eps);
  s.step_size = static_cast<float>(sgd ? -lr : -(lr / (1 - std::pow(beta1, t))));
  s.momentum = static_cast<float>(momentum);
  s.last = last;
  return s;
}

inline bool optimizer_rule(const std::string& name, OptimizerRule& rule) {
  if (name == "adamw") rule = OptimizerRule::adamw;
  else if (name == "adam") rule = OptimizerRule::adam;
  else if (name == "sgd") rule = OptimizerRule::sgd;
  else return false;
  return true;
}

// How many moments a rule keeps for a tensor whose moments are not all zero.
inline int moments_of(const OptimizerScalars& s) {
  if (s.rule == OptimizerRule::sgd) return s.momentum != 0.0f ? 1 : 0;
  return 2;
}

// Fills `tensors`, or returns what is wrong.
template <typename Tensor>
std::string optimizer_tensors(const OptimizerScalars& s, int64_t step, const std::vector<Tensor>& parameters,
                              const std::vector<Tensor>& first, const std::vector<Tensor>& second,
                              const std::vector<std::optional<Tensor>>& gradients,
                              const std::vector<std::optional<Tensor>>& sources, const std::vector<bool>& fresh,
                              const std::vector<Tensor>& copies, std::vector<OptimizerTensor>& tensors) {
  using Scalar = decltype(parameters[0].scalar_type());
  const size_t count = parameters.size();
  if (step < 1) return "step must be at least 1, got " + std::to_string(step);
  if (first.size() != count || second.size() != count || gradients.size() != count || sources.size() != count ||
      fresh.size() != count || copies.size() != count)
    return "moments, gradients, sources, fresh and copies must have an entry for each parameter";
  const int moments = moments_of(s);
  for (size_t i = 0; i < count; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const Tensor& p = parameters[i];
    const auto fits = [&](const Tensor& other, int64_t elements) {
      return other.get_device() == p.get_device() && other.is_contiguous() && other.numel() == elements;
    };
    if (p.scalar_type() != Scalar::Float || !p.is_contiguous()) return "parameters" + at + " must be contiguous float32";
    const int64_t elements = p.numel();
    OptimizerTensor t{};
    t.parameter = static_cast<float*>(p.mutable_data_ptr());
    t.source = t.parameter;
    t.row = elements;
    t.rows = 1;
    t.fresh = fresh[i];
    t.type = GradientType::none;
    if (gradients[i]) {
      const Tensor& g = *gradients[i];
      if (!fits(g, elements)) return "gradients" + at + " must be like the parameter: contiguous, on its device";
      switch (g.scalar_type()) {
        case Scalar::Float: t.type = GradientType::float32; break;
        case Scalar::BFloat16: t.type = GradientType::bfloat16; break;
        case Scalar::Half: t.type = GradientType::float16; break;
        default: return "gradients" + at + " must be float32, bfloat16 or float16";
      }
      t.gradient = g.const_data_ptr();
    }
    if (copies[i].numel()) {
      if (copies[i].scalar_type() != Scalar::BFloat16 || !fits(copies[i], elements))
        return "copies" + at + " must be like the parameter: contiguous bfloat16, on its device";
      t.copy = static_cast<uint16_t*>(copies[i].mutable_data_ptr());
    }
    const bool kept = first[i].numel() != 0;
    for (int moment = 0; moment < 2; ++moment) {
      const Tensor& m = moment ? second[i] : first[i];
      const std::string named = (moment ? "second_moments" : "first_moments") + at;
      if (m.numel() == 0 && !(kept && moment < moments)) continue;
      if (moment >= moments) return named + " must be empty: the rule keeps none";
      if (m.scalar_type() != Scalar::Float || !fits(m, elements))
        return named + " must be like the parameter: contiguous float32, on its device";
      (moment ? t.second : t.first) = static_cast<float*>(m.mutable_data_ptr());
    }
    // Moments that are not stored are zero, and must stay zero.
    if (moments && !kept && elements && (gradients[i] || s.weight_decay != 0.0f || !t.fresh))
      return "first_moments" + at + " may be empty only where the moments are zero and stay so";
    if (sources[i]) {
      const Tensor& source = *sources[i];
      const int64_t row = source.numel();
      // Only a parameter without elements has a source without any; there is nothing to do for it.
      const bool whole = row ? elements % row == 0 : elements == 0;
      if (source.scalar_type() != Scalar::Float || !fits(source, row) || !whole)
        return "sources" + at + " must be contiguous float32 of one copy of the parameter, on its device";
      t.source = static_cast<const float*>(source.const_data_ptr());
      t.row = row;
      t.rows = row ? elements / row : 1;
    }
    if (elements) tensors.push_back(t);
  }
  return "";
}

}  // namespace rada_fast
