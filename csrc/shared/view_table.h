// The table of views that the operators on pictures take, on either device.
#pragma once

#include <cstdint>

namespace rada_fast {

// One row: the picture's number; the box in it (top, left, height, width); the size that the box is resized to; where the
// view lies in the resized box (top, left); whether it is mirrored; whether the filter is bicubic, otherwise bilinear.
struct View {
  int64_t picture, top, left, height, width, resized_height, resized_width, window_top, window_left, flip, bicubic;
};
constexpr int64_t kViewColumns = 11;
static_assert(sizeof(View) == kViewColumns * sizeof(int64_t));

// Pillow's order of the two passes of a resize. The horizontal pass comes first, but with `tall_first`, as in Pillow from
// version 13 on, the vertical one does where the height shrinks by more than twice what the width does.
inline bool vertical_first(const View& view, bool tall_first) {
  const int64_t shrinks = view.height - view.resized_height;
  return tall_first && shrinks > 0 && shrinks > 2 * (view.width - view.resized_width);
}

// The operations of AugMix, by their numbers in the operators' arguments.
enum class Operation : int64_t { none, autocontrast, equalize, posterize, solarize, affine };
constexpr int64_t kOperations = 6;

}  // namespace rada_fast
