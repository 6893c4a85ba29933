// Boxes and flips of random views, drawn as torchvision's RandomResizedCrop.get_params and RandomHorizontalFlip draw
// them: the same numbers in the same order from the same generator.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/DistributionsHelper.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <optional>

#include "view_frames.h"

namespace rada_fast {
namespace {

using at::Tensor;

class Draws {
 public:
  explicit Draws(const std::optional<at::Generator>& generator)
      : own_(at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator())), lock_(own_->mutex_) {}

  // torch.empty(1).uniform_(low, high)
  float uniform(double low, double high) {
    return at::uniform_real_distribution<float>(static_cast<float>(low), static_cast<float>(high))(own_);
  }
  // torch.randint(0, end, (1,))
  int64_t below(int64_t end) { return at::uniform_int_from_to_distribution<int64_t>(end, 0)(own_); }

 private:
  at::CPUGeneratorImpl* own_;
  std::lock_guard<std::mutex> lock_;
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
  // PyTorch's own exponential: the last bit of another may differ, and a box with it.
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

Tensor random_views(int64_t height, int64_t width, int64_t size, int64_t count, at::ArrayRef<double> scale,
                    at::ArrayRef<double> ratio, std::optional<at::Generator> generator) {
  TORCH_CHECK_VALUE(height > 0 && width > 0 && size > 0 && count >= 0, "height, width and size must be at least 1 and count ",
              "at least 0, got ", height, ", ", width, ", ", size, ", ", count);
  BoxDraws boxes(range_of(scale, ratio));
  Tensor out = at::empty({count, kViewColumns}, at::kLong);
  View* views = reinterpret_cast<View*>(out.mutable_data_ptr<int64_t>());
  Draws draws(generator);
  for (int64_t i = 0; i < count; ++i) {
    views[i] = {0, 0, 0, 0, 0, size, size, 0, 0, 0, 0};
    boxes.draw(draws, height, width, views[i]);
    views[i].flip = draws.uniform(0, 1) < 0.5f;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CompositeExplicitAutograd, library) { library.impl("random_views", &random_views); }

}  // namespace rada_fast
