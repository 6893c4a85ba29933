#include "../shared/episodic_optimizer_arguments.h"
#include "episodic_optimizer.h"
#include "torch_glue.h"

namespace rada_fast {
namespace {

void episodic_optimizer_step(std::vector<Tensor> parameters, std::vector<Tensor> first, std::vector<Tensor> second,
                             std::vector<std::optional<Tensor>> gradients, std::vector<std::optional<Tensor>> sources,
                             std::vector<bool> fresh, std::string name, int64_t step, double lr, double weight_decay,
                             double beta1, double beta2, double eps, double momentum, bool /* torch_roots: no others here */,
                             std::vector<Tensor> copies, bool last) {
  OptimizerRule rule;
  STD_TORCH_CHECK(optimizer_rule(name, rule), "rule must be 'adamw', 'adam' or 'sgd', got '", name, "'");
  const OptimizerScalars scalars = optimizer_scalars(rule, step, lr, weight_decay, beta1, beta2, eps, momentum, last);
  std::vector<OptimizerTensor> tensors;
  const std::string refused =
      optimizer_tensors<Tensor>(scalars, step, parameters, first, second, gradients, sources, fresh, copies, tensors);
  STD_TORCH_CHECK(refused.empty(), refused);
  if (tensors.empty()) return;
  const Launch launch(parameters[0]);
  check(rada_fast_episodic_optimizer(tensors.data(), static_cast<int64_t>(tensors.size()), &scalars, launch.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rada_fast, CUDA, library) {
  library.impl("episodic_optimizer_step", TORCH_BOX(&episodic_optimizer_step));
}

}  // namespace rada_fast
