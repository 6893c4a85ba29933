// The table of views that the operators on pictures take, on either device.
#pragma once

#include <cstdint>

namespace rada_fast {

// One row: the picture's index; the box in the picture (top, left, height, width); the size to which the box is
// resized; the view's position in the resized box (top, left); whether it is mirrored; whether the filter is bicubic,
// else bilinear.
struct View {
  int64_t picture, top, left, height, width, resized_height, resized_width, window_top, window_left, flip, bicubic;
};
constexpr int64_t kViewColumns = 11;
static_assert(sizeof(View) == kViewColumns * sizeof(int64_t));

// Pillow's order of the two passes of a resize. The horizontal pass comes first. With `tall_first`, as in Pillow from
// version 13 on, the vertical pass comes first where the height loses more than twice as many pixels as the width.
inline bool vertical_first(const View& view, bool tall_first) {
  const int64_t shrinks = view.height - view.resized_height;
  return tall_first && shrinks > 0 && shrinks > 2 * (view.width - view.resized_width);
}

// The operations of AugMix, by their numbers in the operators' arguments.
enum class Operation : int64_t { none, autocontrast, equalize, posterize, solarize, affine };
constexpr int64_t kOperations = 6;

}  // namespace rada_fast
