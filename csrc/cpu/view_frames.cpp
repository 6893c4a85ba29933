#include "view_frames.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rada_fast {

int64_t most_taps(int64_t in_size, int64_t out_size, bool bicubic) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  return static_cast<int64_t>(std::ceil((bicubic ? 2.0 : 1.0) * std::max(scale, 1.0))) * 2 + 1;
}

void check_views(at::TensorList pictures, const at::Tensor& views, int64_t size) {
  TORCH_CHECK_VALUE(size > 0, "size must be at least 1, got ", size);
  TORCH_CHECK_VALUE(views.dim() == 2 && views.size(1) == kViewColumns && views.scalar_type() == at::kLong,
              "views must be (N, ", kViewColumns, ") int64, got ", views.sizes(), " ", views.scalar_type());
  for (size_t i = 0; i < pictures.size(); ++i) {
    const at::Tensor& picture = pictures[i];
    TORCH_CHECK_VALUE(picture.dim() == 3 && picture.size(2) == 3 && picture.scalar_type() == at::kByte, "pictures[", i,
                "] must be (height, width, 3) uint8, got ", picture.sizes(), " ", picture.scalar_type());
    TORCH_CHECK_VALUE(picture.numel() > 0, "pictures[", i, "] has no pixels, its shape is ", picture.sizes());
  }
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
  const at::Tensor whole = views.contiguous();
  const View* rows = reinterpret_cast<const View*>(whole.const_data_ptr<int64_t>());
  for (int64_t i = 0; i < views.size(0); ++i) {
    const View& v = rows[i];
    TORCH_CHECK_VALUE(v.picture >= 0 && v.picture < static_cast<int64_t>(pictures.size()), "views[", i, "] names picture ",
                v.picture, " of ", pictures.size());
    const int64_t height = pictures[v.picture].size(0), width = pictures[v.picture].size(1);
    TORCH_CHECK_VALUE(v.top >= 0 && v.left >= 0 && v.height > 0 && v.width > 0 && v.height <= height && v.width <= width &&
                    v.top <= height - v.height && v.left <= width - v.width,
                "views[", i, "] has a box (top, left, height, width) of (", v.top, ", ", v.left, ", ", v.height, ", ",
                v.width, ") in a picture of ", height, " by ", width);
    TORCH_CHECK_VALUE(v.resized_height >= size && v.resized_width >= size && v.resized_height <= most &&
                    v.resized_width <= most && v.window_top >= 0 && v.window_left >= 0 &&
                    v.window_top <= v.resized_height - size && v.window_left <= v.resized_width - size,
                "views[", i, "] has a window of ", size, " by ", size, " at (", v.window_top, ", ", v.window_left,
                ") in a resized box of ", v.resized_height, " by ", v.resized_width);
  }
}

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor out = at::empty(sizes, at::TensorOptions().dtype(dtype));
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.nbytes();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  // This is only advice: where the system refuses it, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return out;
}

int64_t row_slack(const View* views, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i)
    most = std::max(most, most_taps(views[i].width, views[i].resized_width, views[i].bicubic != 0));
  return most + kRowSlack;
}

Planes::Planes(at::TensorList pictures, const ViewLoops& loops, int64_t slack) {
  int64_t total = 0;
  std::vector<int64_t> starts, first_rows{0};
  for (const at::Tensor& picture : pictures) {
    starts.push_back(total);
    total += picture.numel();
    first_rows.push_back(first_rows.back() + picture.size(0));
  }
  pixels_ = empty_in_large_pages({total + slack}, at::kByte);
  uint8_t* pixels = pixels_.mutable_data_ptr<uint8_t>();
  // The bytes past the last plane are read and multiplied by zero.
  std::fill_n(pixels + total, slack, uint8_t{0});
  for (size_t i = 0; i < pictures.size(); ++i)
    places_.push_back({pixels + starts[i], pictures[i].size(0), pictures[i].size(1)});
  at::parallel_for(0, first_rows.back(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = std::upper_bound(first_rows.begin(), first_rows.end(), row) - first_rows.begin() - 1;
      const at::Tensor& picture = pictures[i];
      const int64_t y = row - first_rows[i], width = picture.size(1), plane = picture.size(0) * width;
      const uint8_t* from = picture.const_data_ptr<uint8_t>() + y * picture.stride(0);
      uint8_t* to = pixels + starts[i] + y * width;
      if (picture.stride(2) == 1 && picture.stride(1) == 3) {
        loops.split(from, width, to, to + plane, to + 2 * plane);
      } else {
        for (int64_t channel = 0; channel < 3; ++channel)
          for (int64_t x = 0; x < width; ++x)
            to[channel * plane + x] = from[x * picture.stride(1) + channel * picture.stride(2)];
      }
    }
  });
}

ChannelTables::ChannelTables(at::ArrayRef<double> mean, at::ArrayRef<double> std, const ViewLoops& loops) {
  TORCH_CHECK_VALUE(mean.size() == 3 && std.size() == 3, "mean and std must have 3 values, got ", mean.size(), " and ",
              std.size());
  for (size_t channel = 0; channel < 3; ++channel) {
    const float m = static_cast<float>(mean[channel]), s = static_cast<float>(std[channel]);
    TORCH_CHECK_VALUE(s != 0.0f, "std must not be zero, got ", std);
    for (int value = 0; value < 256; ++value) tables_[channel][value] = (static_cast<float>(value) / 255.0f - m) / s;
    normalisations_[channel] = {m, s, 1.0f / s, false, tables_[channel].data()};
    loops.prepare(normalisations_[channel]);
  }
}

AxisWeights Resizer::Storage::fill(const Axis& axis, std::vector<double>& scratch, const ViewLoops& loops) {
  const int64_t padded = padded_outputs(axis.count), most = most_taps(axis.in_size, axis.out_size, axis.bicubic);
  first.resize(padded);
  taps.resize(padded);
  weights.resize(most * padded);
  scratch.resize(most * 64);
  AxisWeights out{most, padded, first.data(), taps.data(), weights.data()};
  loops.axis_weights(axis, scratch.data(), out);
  // Pillow's bound is larger than needed: with a window of three, an output has at most three or four taps.
  out.most_taps = *std::max_element(taps.begin(), taps.end());
  return out;
}

Resizer::Resizer(const Planes& planes, const ViewLoops& loops, int64_t size, bool tall_first)
    : planes_(planes), loops_(loops), size_(size), padded_(padded_outputs(size)), tall_first_(tall_first) {
  out_.resize(3 * padded_);
  for (int64_t plane = 0; plane < 3; ++plane) out_rows_[plane] = out_.data() + plane * padded_;
}

void Resizer::start(const View& view) {
  rows_ = vertical_.fill({view.height, view.resized_height, view.window_top, size_, false, view.bicubic != 0}, scratch_,
                         loops_);
  columns_.axis = horizontal_.fill(
      {view.width, view.resized_width, view.window_left, size_, view.flip != 0, view.bicubic != 0}, scratch_, loops_);
  columns_.groups = (columns_.axis.most_taps + 3) / 4;
  offsets_.resize(padded_);
  shuffles_.resize(padded_ * 8);
  products_.resize(columns_.groups * padded_ * 8);
  columns_.offsets = offsets_.data();
  columns_.shuffles = shuffles_.data();
  columns_.products = products_.data();
  loops_.pack_columns(columns_);
  weights_.resize(rows_.most_taps);
  vertical_first_ = vertical_first(view, tall_first_);
  if (vertical_first_) {
    const AxisWeights& axis = columns_.axis;
    const auto [low, high] = std::minmax(axis.first[0], axis.first[size_ - 1]);
    strip_begin_ = low;
    strip_padded_ = padded_outputs(std::min<int64_t>(high + axis.most_taps, view.width) - low);
    strip_.resize(3 * (strip_begin_ + strip_padded_ + 4 * columns_.groups + kRowSlack));
    pixel_taps_.resize(rows_.most_taps);
  } else {
    ring_rows_ = rows_.most_taps;
    ring_.resize(ring_rows_ * 3 * padded_);
    taps_.resize(rows_.most_taps);
    next_row_ = 0;
  }
}

void Resizer::across_then_down(const View& view, int64_t y) {
  const int64_t first = rows_.first[y], count = rows_.taps[y];
  const auto ring_row = [&](int64_t row, int64_t plane) {
    return ring_.data() + (row % ring_rows_ * 3 + plane) * padded_;
  };
  for (next_row_ = std::max(next_row_, first); next_row_ < first + count; ++next_row_) {
    std::array<const uint8_t*, 3> in;
    std::array<uint16_t*, 3> out;
    for (int64_t plane = 0; plane < 3; ++plane) {
      in[plane] = planes_.row(view.picture, plane, view.top + next_row_) + view.left;
      out[plane] = ring_row(next_row_, plane);
    }
    loops_.horizontal(columns_, in.data(), out.data());
  }
  for (int64_t tap = 0; tap < count; ++tap) weights_[tap] = rows_.weights[tap * rows_.padded + y];
  for (int64_t plane = 0; plane < 3; ++plane) {
    for (int64_t tap = 0; tap < count; ++tap) taps_[tap] = ring_row(first + tap, plane);
    loops_.vertical(taps_.data(), weights_.data(), count, padded_, out_rows_[plane]);
  }
}

void Resizer::down_then_across(const View& view, int64_t y) {
  const int64_t first = rows_.first[y], count = rows_.taps[y], stride = static_cast<int64_t>(strip_.size()) / 3;
  for (int64_t tap = 0; tap < count; ++tap) weights_[tap] = rows_.weights[tap * rows_.padded + y];
  std::array<const uint8_t*, 3> in;
  for (int64_t plane = 0; plane < 3; ++plane) {
    for (int64_t tap = 0; tap < count; ++tap)
      pixel_taps_[tap] = planes_.row(view.picture, plane, view.top + first + tap) + view.left + strip_begin_;
    uint8_t* const row = strip_.data() + plane * stride;
    loops_.vertical_pixels(pixel_taps_.data(), weights_.data(), count, strip_padded_, row + strip_begin_);
    in[plane] = row;
  }
  loops_.horizontal(columns_, in.data(), out_rows_.data());
}

}  // namespace rada_fast
