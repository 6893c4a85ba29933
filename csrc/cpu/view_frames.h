// Checks the table of views of pictures on the CPU, and resizes one view row by row. See view_loops.h.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <vector>

#include "../shared/view_table.h"
#include "view_loops.h"

namespace rada_fast {

// Raises an error where a view leaves its picture, or a window leaves its resized box.
void check_views(at::TensorList pictures, const at::Tensor& views, int64_t size);

// The pictures as planes, (3, height, width) each. All views of a picture read the same planes.
class Planes {
 public:
  Planes(at::TensorList pictures, const ViewLoops& loops, int64_t slack);
  const uint8_t* row(int64_t picture, int64_t plane, int64_t y) const {
    const Place& place = places_[picture];
    return place.pixels + (plane * place.height + y) * place.width;
  }

 private:
  struct Place {
    const uint8_t* pixels;
    int64_t height, width;
  };
  std::vector<Place> places_;
  at::Tensor pixels_;
};

// Returns an uninitialised tensor, for which it asks the system for pages of 2 MiB if there are such. The 38 MB of 64
// views of 224 pixels would otherwise take more time in page faults of 4 KiB than in arithmetic.
at::Tensor empty_in_large_pages(at::IntArrayRef sizes, at::ScalarType dtype);

// Returns the number of bytes past the end of a row that may be read for a view.
int64_t row_slack(const View* views, int64_t count);

// The table of (v / 255 - mean) / std for the 256 values v of three channels, as PyTorch computes it in float32.
class ChannelTables {
 public:
  ChannelTables(at::ArrayRef<double> mean, at::ArrayRef<double> std, const ViewLoops& loops);
  const Normalisation& operator[](int64_t channel) const { return normalisations_[channel]; }

 private:
  std::array<std::array<float, 256>, 3> tables_;
  std::array<Normalisation, 3> normalisations_;
};

// Resizes one view after another, each row by row; every thread has an object of its own. Where the horizontal pass comes
// first (see vertical_first), a ring keeps the rows that the vertical pass still needs.
class Resizer {
 public:
  Resizer(const Planes& planes, const ViewLoops& loops, int64_t size, bool tall_first);

  // Calls row(y, words) for each y with three rows, one per channel, of `size` values 0..255 in 16-bit words.
  template <typename Row>
  void resize(const View& view, Row row) {
    start(view);
    for (int64_t y = 0; y < size_; ++y) row(y, next(view, y));
  }

 private:
  struct Storage {
    std::vector<int32_t> first, taps, weights;
    AxisWeights fill(const Axis& axis, std::vector<double>& scratch, const ViewLoops& loops);
  };
  void start(const View& view);
  const std::array<uint16_t*, 3>& next(const View& view, int64_t y) {
    vertical_first_ ? down_then_across(view, y) : across_then_down(view, y);
    return out_rows_;
  }
  void across_then_down(const View& view, int64_t y);
  void down_then_across(const View& view, int64_t y);

  const Planes& planes_;
  const ViewLoops& loops_;
  const int64_t size_, padded_;
  const bool tall_first_;
  bool vertical_first_;
  Storage horizontal_, vertical_;
  AxisWeights rows_;
  Columns columns_;
  std::vector<double> scratch_;
  std::vector<int32_t> offsets_, weights_;
  std::vector<uint8_t> shuffles_;
  std::vector<int16_t> products_;
  std::vector<uint16_t> ring_, out_;
  std::vector<const uint16_t*> taps_;
  std::vector<const uint8_t*> pixel_taps_;
  std::vector<uint8_t> strip_;              // one row of each plane after the vertical pass, where that comes first
  int64_t strip_begin_, strip_padded_;      // the columns of the strip that are needed
  std::array<uint16_t*, 3> out_rows_;
  int64_t ring_rows_, next_row_;  // rows below next_row_ have been through the horizontal pass
};

}  // namespace rada_fast
