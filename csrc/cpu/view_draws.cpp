// Draws boxes and flips of random views like torchvision's RandomResizedCrop.get_params and RandomHorizontalFlip, and
// AugMix's operations and weights like rada_fast.reference.augmix: the same numbers in the same order from the same
// generator.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/DistributionsHelper.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>

#include "augmix_loops.h"
#include "view_frames.h"

namespace rada_fast {
namespace {

using at::Tensor;

class Draws {
 public:
  explicit Draws(const std::optional<at::Generator>& generator)
      : generator_(generator.value_or(at::detail::getDefaultCPUGenerator())),
        own_(at::check_generator<at::CPUGeneratorImpl>(generator_)),
        value_(at::empty({1}, at::kFloat)) {}

  // Equals torch.empty(1).uniform_(low, high). PyTorch computes it, because the last bit depends on whether the processor
  // fuses the product and the sum.
  float uniform(double low, double high) {
    value_.uniform_(low, high, generator_);
    return *value_.const_data_ptr<float>();
  }
  // Equals torch.rand(1).
  float unit() {
    const std::lock_guard<std::mutex> lock(own_->mutex_);
    return static_cast<float>(at::uniform_real_distribution<float>(0.0f, 1.0f)(own_));
  }
  // Equals torch.randint(begin, end, (1,)).
  int64_t between(int64_t begin, int64_t end) {
    const std::lock_guard<std::mutex> lock(own_->mutex_);
    return at::uniform_int_from_to_distribution<int64_t>(end - begin, begin)(own_);
  }
  int64_t below(int64_t end) { return between(0, end); }
  // Draws from the symmetric Dirichlet distribution with parameter 1: exponentials divided by their sum.
  Tensor shares(int64_t count) {
    const Tensor drawn = at::empty({count}, at::kFloat).exponential_(1.0, generator_);
    return drawn / drawn.sum();
  }

 private:
  const at::Generator generator_;
  at::CPUGeneratorImpl* const own_;
  Tensor value_;
};

struct CropRange {
  double low, high, ratio_low, ratio_high, log_low, log_high;
};

class BoxDraws {
 public:
  explicit BoxDraws(const CropRange& range) : range_(range), value_(at::empty({1}, at::kFloat)) {}

  void draw(Draws& draws, int64_t height, int64_t width, View& view) {
    const double area = static_cast<double>(height * width);
    for (int attempt = 0; attempt < 10; ++attempt) {
      const double target = area * static_cast<double>(draws.uniform(range_.low, range_.high));
      const double aspect = exponential(draws.uniform(range_.log_low, range_.log_high));
      // Python rounds halves to even, as nearbyint does.
      const double w = std::nearbyint(std::sqrt(target * aspect)), h = std::nearbyint(std::sqrt(target / aspect));
      if (0 < w && w <= static_cast<double>(width) && 0 < h && h <= static_cast<double>(height)) {
        view.height = static_cast<int64_t>(h);
        view.width = static_cast<int64_t>(w);
        view.top = draws.below(height - view.height + 1);
        view.left = draws.below(width - view.width + 1);
        return;
      }
    }
    const double ratio = static_cast<double>(width) / static_cast<double>(height);
    view.height = height;
    view.width = width;
    if (ratio < range_.ratio_low)
      view.height = static_cast<int64_t>(std::nearbyint(static_cast<double>(width) / range_.ratio_low));
    else if (ratio > range_.ratio_high)
      view.width = static_cast<int64_t>(std::nearbyint(static_cast<double>(height) * range_.ratio_high));
    view.top = (height - view.height) / 2;
    view.left = (width - view.width) / 2;
  }

 private:
  // PyTorch computes the exponential: another one may differ in the last bit, and then the box would differ too.
  double exponential(float x) {
    *value_.mutable_data_ptr<float>() = x;
    value_.exp_();
    return static_cast<double>(*value_.const_data_ptr<float>());
  }
  const CropRange range_;
  Tensor value_;
};

CropRange range_of(at::ArrayRef<double> scale, at::ArrayRef<double> ratio) {
  TORCH_CHECK_VALUE(scale.size() == 2 && ratio.size() == 2, "scale and ratio must be (low, high)");
  TORCH_CHECK_VALUE(0 < scale[0] && scale[0] <= scale[1], "scale must be 0 < low <= high, got ", scale);
  TORCH_CHECK_VALUE(0 < ratio[0] && ratio[0] <= ratio[1], "ratio must be 0 < low <= high, got ", ratio);
  const Tensor logs =
      at::tensor({static_cast<float>(ratio[0]), static_cast<float>(ratio[1])}, at::kFloat).log();
  const float* values = logs.const_data_ptr<float>();
  return {scale[0], scale[1], ratio[0], ratio[1], values[0], values[1]};
}

void check_sizes(int64_t height, int64_t width, int64_t size, int64_t count) {
  TORCH_CHECK_VALUE(height > 0 && width > 0 && size > 0 && count >= 0,
                    "height, width and size must be at least 1 and count at least 0, got ", height, ", ", width, ", ",
                    size, " and ", count);
}

void draw_view(Draws& draws, BoxDraws& boxes, int64_t height, int64_t width, int64_t size, View& view) {
  view = {0, 0, 0, 0, 0, size, size, 0, 0, 0, 0};
  boxes.draw(draws, height, width, view);
  view.flip = draws.unit() < 0.5f;
}

Tensor random_views(int64_t height, int64_t width, int64_t size, int64_t count, at::ArrayRef<double> scale,
                    at::ArrayRef<double> ratio, std::optional<at::Generator> generator) {
  check_sizes(height, width, size, count);
  BoxDraws boxes(range_of(scale, ratio));
  Tensor out = at::empty({count, kViewColumns}, at::kLong);
  View* views = reinterpret_cast<View*>(out.mutable_data_ptr<int64_t>());
  Draws draws(generator);
  for (int64_t i = 0; i < count; ++i) draw_view(draws, boxes, height, width, size, views[i]);
  return out;
}

// The nine operations among which the test-time protocols' AugMix draws, in its order.
enum class Drawn : int64_t {
  autocontrast, equalize, posterize, rotate, solarize, shear_x, shear_y, translate_x, translate_y
};
constexpr int64_t kDrawn = 9;

// Draws the strength of one operation: writes its six values and returns which operation it is.
Operation draw_operation(Draws& draws, Drawn drawn, double severity, int64_t size, double* values) {
  const auto level = [&](double most) { return static_cast<double>(draws.uniform(0.1, severity)) * most / 10; };
  const auto is_negative = [&] { return draws.unit() > 0.5f; };
  const auto signed_value = [&](double value) { return is_negative() ? -value : value; };
  const auto pixels = [&] { return signed_value(std::trunc(level(static_cast<double>(size) / 3))); };
  std::fill_n(values, 6, 0.0);
  values[0] = values[4] = 1.0;
  switch (drawn) {
    case Drawn::autocontrast: return Operation::autocontrast;
    case Drawn::equalize: return Operation::equalize;
    case Drawn::posterize: values[0] = 4 - std::trunc(level(4)); return Operation::posterize;
    case Drawn::solarize: values[0] = 256 - std::trunc(level(256)); return Operation::solarize;
    case Drawn::rotate: {
      const double degrees = signed_value(std::trunc(level(30)));
      if (degrees == 0) return Operation::none;
      chosen_loops<AugmixLoops>().rotation(degrees, size, values);
      return Operation::affine;
    }
    case Drawn::shear_x: values[1] = signed_value(level(0.3)); return Operation::affine;
    case Drawn::shear_y: values[3] = signed_value(level(0.3)); return Operation::affine;
    case Drawn::translate_x: values[2] = pixels(); return Operation::affine;
    case Drawn::translate_y: values[5] = pixels(); return Operation::affine;
  }
  return Operation::none;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> random_augmix(int64_t height, int64_t width, int64_t size, int64_t count,
                                                         at::ArrayRef<double> scale, at::ArrayRef<double> ratio,
                                                         int64_t chains, int64_t depth, double severity,
                                                         std::optional<at::Generator> generator) {
  check_sizes(height, width, size, count);
  TORCH_CHECK_VALUE(chains > 0 && depth > 0 && severity >= 0.1 && severity <= 10,
                    "chains and depth must be at least 1 and severity in 0.1..10, got ", chains, ", ", depth, ", ",
                    severity);
  BoxDraws boxes(range_of(scale, ratio));
  Tensor out = at::empty({count, kViewColumns}, at::kLong);
  Tensor operations = at::zeros({count, chains, depth}, at::kLong);
  Tensor matrices = at::zeros({count, chains, depth, 6}, at::kDouble);
  Tensor weights = at::empty({count, chains + 2}, at::kFloat);
  View* views = reinterpret_cast<View*>(out.mutable_data_ptr<int64_t>());
  Draws draws(generator);
  for (int64_t i = 0; i < count; ++i) {
    draw_view(draws, boxes, height, width, size, views[i]);
    float* weight = weights.mutable_data_ptr<float>() + i * (chains + 2);
    const Tensor shares = draws.shares(chains);
    std::copy_n(shares.const_data_ptr<float>(), chains, weight);
    const double share = draws.unit();
    weight[chains] = static_cast<float>(share);
    weight[chains + 1] = static_cast<float>(1.0 - share);
    for (int64_t chain = 0; chain < chains; ++chain) {
      const int64_t first = (i * chains + chain) * depth, steps = draws.between(1, depth + 1);
      for (int64_t step = first; step < first + steps; ++step)
        operations.mutable_data_ptr<int64_t>()[step] = static_cast<int64_t>(
            draw_operation(draws, static_cast<Drawn>(draws.below(kDrawn)), severity, size,
                           matrices.mutable_data_ptr<double>() + 6 * step));
    }
  }
  return {out, operations, matrices, weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CompositeExplicitAutograd, library) {
  library.impl("random_views", &random_views);
  library.impl("random_augmix", &random_augmix);
}

}  // namespace rada_fast
