// One step of the optimiser: a pass over all tensors of all episodes, in chunks that stay in a core's cache.
//
// Square roots are computed by the processor, which rounds them correctly. PyTorch may call a vector mathematics library
// that rounds differently (measured: a fifth of the roots differ by one unit in the last place) and takes as long as all
// the rest. With torch_roots the roots come from PyTorch, and every bit of the result equals PyTorch's.
#include "../shared/episodic_optimizer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sqrt_cpu_dispatch.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../shared/episodic_optimizer_arguments.h"
#include "episodic_optimizer_loops.h"

namespace rada_fast {
namespace {

// The number of elements of a chunk. Its p, m, v, g and root take 320 KiB, well within a second-level cache. Calling
// PyTorch for the roots of a chunk takes far less time than computing them.
constexpr int64_t kChunk = 16384;

struct ThreadBuffers {
  std::unique_ptr<float[]> gradient{new float[kChunk]()}, root{new float[kChunk]};
  bool gradient_is_zero = true;
};

size_t bytes_of(GradientType type) { return type == GradientType::float32 ? 4 : 2; }

const float* gradient_of(const OptimizerTensor& t, int64_t at, int64_t count, ThreadBuffers& buffers) {
  float* buffer = buffers.gradient.get();
  if (t.type == GradientType::none) {
    if (!buffers.gradient_is_zero) std::fill(buffer, buffer + kChunk, 0.0f);
    buffers.gradient_is_zero = true;
    return buffer;
  }
  const void* from = static_cast<const char*>(t.gradient) + static_cast<size_t>(at) * bytes_of(t.type);
  if (t.type == GradientType::float32) return static_cast<const float*>(from);
  chosen_loops<OptimizerLoops>().widen(from, t.type, count, buffer);
  buffers.gradient_is_zero = false;
  return buffer;
}

void step_chunk(const OptimizerScalars& s, bool torch_roots, const OptimizerTensor& t, int64_t row, int64_t begin,
                int64_t count, ThreadBuffers& buffers) {
  const OptimizerLoops& loops = chosen_loops<OptimizerLoops>();
  const int64_t at = row * t.row + begin;
  float* parameter = t.parameter + at;
  const float* source = t.source == t.parameter ? parameter : t.source + begin;
  if (s.rule == OptimizerRule::sgd && (t.type != GradientType::none || t.first || s.weight_decay != 0.0f)) {
    float* first = t.first ? t.first + at : nullptr;
    loops.descend(s, source, gradient_of(t, at, count, buffers), t.fresh, count, first, parameter);
  } else if (t.first == nullptr) {
    loops.scale(s.decay, source, count, parameter);
  } else if (!torch_roots) {
    loops.adam(s, source, gradient_of(t, at, count, buffers), t.fresh, count, t.first + at, t.second + at, parameter);
  } else {
    float *first = t.first + at, *second = t.second + at, *root = buffers.root.get();
    loops.moments(s, source, gradient_of(t, at, count, buffers), t.fresh, count, first, second);
    at::Tensor roots = at::from_blob(root, {count}, at::kFloat);
    at::cpu::sqrt_out(roots, at::from_blob(second, {count}, at::kFloat));
    loops.update(s, source, first, root, count, parameter);
  }
  if (t.copy) loops.narrow(parameter, count, t.copy + at);
}

void step_all(const OptimizerScalars& s, bool torch_roots, const std::vector<OptimizerTensor>& tensors) {
  std::vector<int64_t> ends;
  int64_t tasks = 0;
  for (const auto& t : tensors) ends.push_back(tasks += (t.row + kChunk - 1) / kChunk * t.rows);
  // Tensors take different times, so every thread takes the next task instead of a fixed share.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    thread_local ThreadBuffers buffers;
    size_t which = 0;
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
      while (task >= ends[which]) ++which;
      const OptimizerTensor& t = tensors[which];
      const int64_t local = task - (which ? ends[which - 1] : 0);
      // Rows change fastest, so that the row that all copies start from is read from memory once.
      const int64_t row = local % t.rows, begin = local / t.rows * kChunk;
      step_chunk(s, torch_roots, t, row, begin, std::min(kChunk, t.row - begin), buffers);
    }
  });
}

void episodic_optimizer_step(at::TensorList parameters, at::TensorList first, at::TensorList second,
                             const c10::List<std::optional<at::Tensor>>& gradients,
                             const c10::List<std::optional<at::Tensor>>& sources, const c10::List<bool>& fresh,
                             std::string_view name, int64_t step, double lr, double weight_decay, double beta1,
                             double beta2, double eps, double momentum, bool torch_roots, at::TensorList copies,
                             bool last) {
  OptimizerRule rule;
  TORCH_CHECK(optimizer_rule(std::string(name), rule), "rule must be 'adamw', 'adam' or 'sgd', got '", name, "'");
  const OptimizerScalars scalars = optimizer_scalars(rule, step, lr, weight_decay, beta1, beta2, eps, momentum, last);
  std::vector<OptimizerTensor> tensors;
  const std::string refused =
      optimizer_tensors<at::Tensor>(scalars, step, parameters.vec(), first.vec(), second.vec(), gradients.vec(),
                                    sources.vec(), {fresh.begin(), fresh.end()}, copies.vec(), tensors);
  TORCH_CHECK(refused.empty(), refused);
  step_all(scalars, torch_roots, tensors);
  // A tensor's version tells others, such as a copy of it or autograd, that its values have changed.
  for (const at::Tensor& parameter : parameters)
    if (!parameter.is_inference()) parameter.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) {
  library.impl("episodic_optimizer_step", TORCH_FN(episodic_optimizer_step));
}

}  // namespace rada_fast
