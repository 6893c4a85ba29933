// Checks pictures and a table of views, and turns them into the frames that the kernels on views take.
#pragma once

#include <limits>
#include <vector>

#include "../shared/view_table.h"
#include "multi_view_crops.h"
#include "torch_glue.h"

namespace rada_fast {

inline std::vector<ViewFrame> view_frames(const std::vector<Tensor>& pictures, const Tensor& given, int64_t size,
                                          bool tall_first) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
  STD_TORCH_CHECK(size > 0 && size < 32768, "size must be from 1 to 32767, got ", size);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == kViewColumns && given.scalar_type() == ScalarType::Long &&
                      given.is_cpu(),
                  "views must be (N, ", kViewColumns, ") int64 on the CPU");
  for (const Tensor& picture : pictures)
    STD_TORCH_CHECK(picture.dim() == 3 && picture.size(2) == 3 && picture.scalar_type() == ScalarType::Byte &&
                        picture.numel() > 0 && picture.get_device_index() == pictures[0].get_device_index() &&
                        picture.is_cuda() && picture.size(0) <= most && picture.size(1) <= most,
                    "pictures must be (height, width, 3) uint8 with pixels, all on one CUDA device");
  const Tensor views = torch::stable::contiguous(given);
  std::vector<ViewFrame> frames;
  frames.reserve(views.size(0));
  const View* table = reinterpret_cast<const View*>(views.const_data_ptr<int64_t>());
  for (int64_t i = 0; i < views.size(0); ++i) {
    const View& view = table[i];
    STD_TORCH_CHECK(view.picture >= 0 && view.picture < static_cast<int64_t>(pictures.size()), "views[", i,
                    "] names picture ", view.picture);
    const Tensor& picture = pictures[view.picture];
    STD_TORCH_CHECK(view.top >= 0 && view.left >= 0 && view.height > 0 && view.width > 0 &&
                        view.height <= picture.size(0) && view.width <= picture.size(1) &&
                        view.top <= picture.size(0) - view.height && view.left <= picture.size(1) - view.width,
                    "views[", i, "] has a box outside its picture");
    STD_TORCH_CHECK(view.resized_height >= size && view.resized_width >= size && view.resized_height <= most &&
                        view.resized_width <= most && view.window_top >= 0 && view.window_left >= 0 &&
                        view.window_top <= view.resized_height - size && view.window_left <= view.resized_width - size,
                    "views[", i, "] has a window outside its resized box");
    const int32_t flags = (view.flip ? kFlip : 0) | (view.bicubic ? kBicubic : 0) |
                          (vertical_first(view, tall_first) ? kVerticalFirst : 0);
    const uint8_t* pixels =
        picture.const_data_ptr<uint8_t>() + view.top * picture.stride(0) + view.left * picture.stride(1);
    frames.push_back({pixels, picture.stride(0), picture.stride(1), picture.stride(2),
                      static_cast<int32_t>(view.height), static_cast<int32_t>(view.width),
                      static_cast<int32_t>(view.resized_height), static_cast<int32_t>(view.resized_width),
                      static_cast<int32_t>(view.window_top), static_cast<int32_t>(view.window_left), flags, 0});
  }
  return frames;
}

// Returns a number for each channel, as float32.
inline std::vector<float> channel_values(const std::vector<double>& values, const char* name) {
  STD_TORCH_CHECK(values.size() == 3, name, " must have 3 values, got ", values.size());
  return {static_cast<float>(values[0]), static_cast<float>(values[1]), static_cast<float>(values[2])};
}

inline int view_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kViewFloat;
    case ScalarType::BFloat16: return kViewBfloat16;
    case ScalarType::Half: return kViewHalf;
    default: STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16"); return -1;
  }
}

}  // namespace rada_fast
