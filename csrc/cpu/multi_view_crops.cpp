// Cuts views of pictures on the CPU: each view is resized, mirrored and normalised in one pass. See view_frames.h.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "view_frames.h"

namespace rada_fast {
namespace {

using at::Tensor;

template <typename T>
void store_row(const uint16_t* values, int64_t count, const std::array<T, 256>& table, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = table[values[i]];
}

template <typename T>
void make(const Planes& planes, const ViewLoops& loops, const ChannelTables& tables, const View* views, int64_t count,
          int64_t size, bool tall_first, T* out) {
  std::array<std::array<T, 256>, 3> stored;
  for (int64_t channel = 0; channel < 3; ++channel)
    for (int value = 0; value < 256; ++value) stored[channel][value] = static_cast<T>(tables[channel].table[value]);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Resizer resizer(planes, loops, size, tall_first);
    for (int64_t i = begin; i < end; ++i)
      resizer.resize(views[i], [&](int64_t y, const std::array<uint16_t*, 3>& rows) {
        for (int64_t channel = 0; channel < 3; ++channel) {
          T* to = out + ((i * 3 + channel) * size + y) * size;
          if constexpr (std::is_same_v<T, float>)
            loops.normalise(rows[channel], size, tables[channel], to);
          else
            store_row(rows[channel], size, stored[channel], to);
        }
      });
  });
}

Tensor multi_view_crops(at::TensorList pictures, const Tensor& views, int64_t size, at::ArrayRef<double> mean,
                        at::ArrayRef<double> std, at::ScalarType dtype, bool tall_first) {
  check_views(pictures, views, size);
  const ViewLoops& loops = chosen_loops<ViewLoops>();
  const ChannelTables tables(mean, std, loops);
  const Tensor whole = views.contiguous();
  const View* rows = reinterpret_cast<const View*>(whole.const_data_ptr<int64_t>());
  const int64_t count = views.size(0);
  Tensor out = empty_in_large_pages({count, 3, size, size}, dtype);
  if (count == 0) return out;
  const Planes planes(pictures, loops, row_slack(rows, count));
  switch (dtype) {
    case at::kFloat: make(planes, loops, tables, rows, count, size, tall_first, out.mutable_data_ptr<float>()); break;
    case at::kBFloat16:
      make(planes, loops, tables, rows, count, size, tall_first, out.mutable_data_ptr<at::BFloat16>());
      break;
    case at::kHalf: make(planes, loops, tables, rows, count, size, tall_first, out.mutable_data_ptr<at::Half>()); break;
    default: TORCH_CHECK_VALUE(false, "dtype must be float32, bfloat16 or float16, got ", dtype);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("multi_view_crops", &multi_view_crops); }

}  // namespace rada_fast
