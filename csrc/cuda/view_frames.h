// What the glue of the kernels on views makes of pictures and a table of views, after checking both.
#pragma once

#include <limits>
#include <vector>

#include "multi_view_crops.h"
#include "torch_glue.h"

namespace rada_fast {

constexpr int64_t kViewColumns = 11;

inline std::vector<ViewFrame> view_frames(const std::vector<Tensor>& pictures, const Tensor& given, int64_t size,
                                          bool tall_first) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
  STD_TORCH_CHECK(size > 0 && size < 32768, "size must be from 1 to 32767, got ", size);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(1) == kViewColumns && given.scalar_type() == ScalarType::Long &&
                      given.is_cpu(),
                  "views must be (N, 11) int64 on the CPU");
  for (const Tensor& picture : pictures)
    STD_TORCH_CHECK(picture.dim() == 3 && picture.size(2) == 3 && picture.scalar_type() == ScalarType::Byte &&
                        picture.numel() > 0 && picture.get_device_index() == pictures[0].get_device_index() &&
                        picture.is_cuda() && picture.size(0) <= most && picture.size(1) <= most,
                    "pictures must be (height, width, 3) uint8 with pixels, all on one CUDA device");
  const Tensor views = torch::stable::contiguous(given);
  std::vector<ViewFrame> frames;
  frames.reserve(views.size(0));
  for (int64_t i = 0; i < views.size(0); ++i) {
    const int64_t* row = views.const_data_ptr<int64_t>() + i * kViewColumns;
    const int64_t index = row[0], top = row[1], left = row[2], height = row[3], width = row[4];
    const int64_t resized_height = row[5], resized_width = row[6], window_top = row[7], window_left = row[8];
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(pictures.size()), "views[", i, "] names picture ", index);
    const Tensor& picture = pictures[index];
    STD_TORCH_CHECK(top >= 0 && left >= 0 && height > 0 && width > 0 && height <= picture.size(0) &&
                        width <= picture.size(1) && top <= picture.size(0) - height && left <= picture.size(1) - width,
                    "views[", i, "] has a box outside its picture");
    STD_TORCH_CHECK(resized_height >= size && resized_width >= size && resized_height <= most &&
                        resized_width <= most && window_top >= 0 && window_left >= 0 &&
                        window_top <= resized_height - size && window_left <= resized_width - size,
                    "views[", i, "] has a window outside its resized box");
    const int64_t shrinks = height - resized_height;
    const bool vertical_first = tall_first && shrinks > 0 && shrinks > 2 * (width - resized_width);
    const int32_t flags =
        (row[9] != 0 ? kFlip : 0) | (row[10] != 0 ? kBicubic : 0) | (vertical_first ? kVerticalFirst : 0);
    const uint8_t* pixels =
        picture.const_data_ptr<uint8_t>() + top * picture.stride(0) + left * picture.stride(1);
    frames.push_back({pixels, picture.stride(0), picture.stride(1), picture.stride(2), static_cast<int32_t>(height),
                      static_cast<int32_t>(width), static_cast<int32_t>(resized_height),
                      static_cast<int32_t>(resized_width), static_cast<int32_t>(window_top),
                      static_cast<int32_t>(window_left), flags, 0});
  }
  return frames;
}

// Three numbers of each channel, as float32.
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
