// Applies AugMix to views of pictures on the CPU. Each view is resized and goes through chains of operations on 8-bit
// pixels, which compute the same as Pillow's ImageOps and Image.transform. The chains are mixed after normalisation. See
// view_frames.h.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "augmix_loops.h"
#include "view_frames.h"

namespace rada_fast {
namespace {

using at::Tensor;

// A Table has a new value for every value of every channel; Counts has the number of times that each value occurs.
using Table = std::array<uint8_t, 3 * 256>;
using Counts = std::array<uint32_t, 3 * 256>;

Table identity() {
  Table table;
  for (int i = 0; i < 3 * 256; ++i) table[i] = static_cast<uint8_t>(i % 256);
  return table;
}

void autocontrast(const uint32_t* counts, uint8_t* table) {
  int low = 0, high = 255;
  while (low < 255 && counts[low] == 0) ++low;
  while (high > 0 && counts[high] == 0) --high;
  if (high <= low) return;
  const double scale = 255.0 / (high - low), offset = -low * scale;
  for (int value = 0; value < 256; ++value) {
    // These are two statements because a fused product and sum would round once where Python rounds twice.
    const volatile double scaled = value * scale;
    const int found = static_cast<int>(scaled + offset);
    table[value] = static_cast<uint8_t>(found < 0 ? 0 : (found > 255 ? 255 : found));
  }
}

void equalize(const uint32_t* counts, uint8_t* table) {
  int64_t total = 0, last = 0, different = 0;
  for (int value = 0; value < 256; ++value)
    if (counts[value] != 0) {
      total += last = counts[value];
      ++different;
    }
  const int64_t step = different <= 1 ? 0 : (total - last) / 255;
  if (step == 0) return;
  int64_t sum = step / 2;
  for (int value = 0; value < 256; ++value) {
    // The last values may be 256, which image.point clips.
    table[value] = static_cast<uint8_t>(std::min<int64_t>(sum / step, 255));
    sum += counts[value];
  }
}

// Returns the table of one operation for an image in which values occur `counts` times.
Table table_of(Operation operation, double amount, const Counts& counts) {
  Table table = identity();
  for (int channel = 0; channel < 3; ++channel) {
    uint8_t* values = table.data() + 256 * channel;
    if (operation == Operation::autocontrast) autocontrast(counts.data() + 256 * channel, values);
    if (operation == Operation::equalize) equalize(counts.data() + 256 * channel, values);
    for (int value = 0; value < 256; ++value) {
      if (operation == Operation::posterize) values[value] &= ~((1 << (8 - static_cast<int>(amount))) - 1);
      if (operation == Operation::solarize && value >= amount) values[value] = static_cast<uint8_t>(255 - value);
    }
  }
  return table;
}

// The image of one chain, kept as pixels and a table that has still to be applied to them: operations on values are
// combined in the table before any pixel changes.
class Chain {
 public:
  Chain(const AugmixLoops& loops, int64_t size)
      : loops_(loops), size_(size), stride_(bordered_stride(size)), scratch_(5 * size) {
    for (auto& buffer : buffers_) buffer.resize(bordered_pixels(size));
  }
  static uint32_t* inside(std::vector<uint32_t>& pixels, int64_t size) {
    return pixels.data() + bordered_stride(size) + 1;
  }

  void start(const uint32_t* image, const Counts* counts) {
    image_ = image;
    image_counts_ = counts;
    table_ = identity();
    changed_ = false;
    next_ = 0;
  }
  void apply(Operation operation, const double* values) {
    switch (operation) {
      case Operation::none: return;
      case Operation::affine: return transform(values);
      default: {
        const bool counted = operation == Operation::autocontrast || operation == Operation::equalize;
        const Table found = table_of(operation, values[0], counted ? counts() : Counts{});
        for (int i = 0; i < 3 * 256; ++i) table_[i] = found[i / 256 * 256 + table_[i]];
        changed_ = true;
      }
    }
  }
  const uint32_t* image() const { return image_; }
  const Table& table() const { return table_; }

 private:
  Counts counts() {
    if (image_counts_ == nullptr) {
      loops_.histogram(image_, size_, stride_, own_counts_.data());
      image_counts_ = &own_counts_;
    }
    if (!changed_) return *image_counts_;
    Counts moved{};
    for (int i = 0; i < 3 * 256; ++i) moved[i / 256 * 256 + table_[i]] += (*image_counts_)[i];
    return moved;
  }
  // Returns the buffer that does not hold the chain's pixels.
  uint32_t* fresh() {
    next_ = 1 - next_;
    return inside(buffers_[next_], size_);
  }
  void transform(const double* matrix) {
    uint32_t* from = fresh();
    if (changed_) {
      loops_.look_up(image_, size_, stride_, table_.data(), from);
      table_ = identity();
      changed_ = false;
      loops_.repeat_edge(from, size_, stride_);
      image_ = from;
      from = fresh();
    }
    loops_.transform(image_, size_, stride_, matrix, scratch_.data(), from);
    loops_.repeat_edge(from, size_, stride_);
    image_ = from;
    image_counts_ = nullptr;
  }

  const AugmixLoops& loops_;
  const int64_t size_, stride_;
  std::vector<double> scratch_;
  std::array<std::vector<uint32_t>, 2> buffers_;
  Table table_;
  Counts own_counts_;
  const uint32_t* image_ = nullptr;
  const Counts* image_counts_ = nullptr;
  bool changed_ = false;
  int next_ = 0;
};

struct Plan {
  int64_t chains, depth;
  const int64_t* operations;  // [views][chains][depth]
  const double* matrices;     // [views][chains][depth][6]
  const float* weights;       // [views][chains + 2]: the weights of the chains, of the plain view, of the mix of the chains
};

void check_plan(const Tensor& views, const Tensor& operations, const Tensor& matrices, const Tensor& weights) {
  TORCH_CHECK_VALUE(operations.dim() == 3 && operations.scalar_type() == at::kLong &&
                        operations.size(0) == views.size(0),
                    "operations must be (N, chains, depth) int64, got ", operations.sizes(), " ",
                    operations.scalar_type());
  const int64_t chains = operations.size(1), depth = operations.size(2);
  TORCH_CHECK_VALUE(matrices.sizes().equals({views.size(0), chains, depth, 6}) && matrices.scalar_type() == at::kDouble,
                    "matrices must be (N, chains, depth, 6) float64, got ", matrices.sizes(), " ",
                    matrices.scalar_type());
  TORCH_CHECK_VALUE(weights.sizes().equals({views.size(0), chains + 2}) && weights.scalar_type() == at::kFloat,
                    "weights must be (N, chains + 2) float32, got ", weights.sizes(), " ", weights.scalar_type());
  const Tensor codes = operations.contiguous(), values = matrices.contiguous();
  const int64_t* code = codes.const_data_ptr<int64_t>();
  const double* value = values.const_data_ptr<double>();
  for (int64_t i = 0; i < codes.numel(); ++i) {
    TORCH_CHECK_VALUE(code[i] >= 0 && code[i] < kOperations, "operations must be 0..", kOperations - 1, ", got ",
                      code[i]);
    if (static_cast<Operation>(code[i]) == Operation::posterize)
      TORCH_CHECK_VALUE(value[6 * i] >= 1 && value[6 * i] <= 8, "posterize keeps 1 to 8 bits, got ", value[6 * i]);
    for (int64_t j = 0; j < 6; ++j)
      TORCH_CHECK_VALUE(std::abs(value[6 * i + j]) <= 1e9, "matrices must be within 1e9, got ", value[6 * i + j]);
  }
}

template <typename T>
void make(const Planes& planes, const ViewLoops& loops, const ChannelTables& normalised, const View* views,
          int64_t count, const Plan& plan, int64_t size, bool tall_first, T* out) {
  const AugmixLoops& own = chosen_loops<AugmixLoops>();
  const int64_t stride = bordered_stride(size);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Resizer resizer(planes, loops, size, tall_first);
    std::vector<uint32_t> pixels(bordered_pixels(size));
    uint32_t* const plain = Chain::inside(pixels, size);
    std::vector<Chain> chains(plan.chains, Chain(own, size));
    std::vector<std::array<float, 3 * 256>> values(plan.chains + 1);
    std::vector<MixTerm> terms(plan.chains);
    std::vector<float> row(size);
    for (int64_t view = begin; view < end; ++view) {
      resizer.resize(views[view], [&](int64_t y, const std::array<uint16_t*, 3>& rows) {
        own.join(rows.data(), size, plain + y * stride);
      });
      own.repeat_edge(plain, size, stride);
      const float* weights = plan.weights + view * (plan.chains + 2);
      const float share = weights[plan.chains], rest = weights[plan.chains + 1];
      // Where the mix has weight 0, the result is the plain view, since the mix is finite.
      const int64_t used = share == 1.0f && rest == 0.0f ? 0 : plan.chains;
      Counts counts;
      bool counted = false;
      for (int64_t chain = 0; chain < used; ++chain) {
        const int64_t first = (view * plan.chains + chain) * plan.depth;
        const auto operation = [&](int64_t step) { return static_cast<Operation>(plan.operations[first + step]); };
        if (!counted) {
          own.histogram(plain, size, stride, counts.data());
          counted = true;
        }
        chains[chain].start(plain, &counts);
        for (int64_t step = 0; step < plan.depth; ++step)
          chains[chain].apply(operation(step), plan.matrices + 6 * (first + step));
        for (int i = 0; i < 3 * 256; ++i)
          values[chain][i] = weights[chain] * normalised[i / 256].table[chains[chain].table()[i]];
        terms[chain] = {chains[chain].image(), values[chain].data()};
      }
      for (int i = 0; i < 3 * 256; ++i) values[plan.chains][i] = share * normalised[i / 256].table[i % 256];
      const MixTerm alone{plain, values[plan.chains].data()};
      for (int64_t channel = 0; channel < 3; ++channel)
        for (int64_t y = 0; y < size; ++y) {
          T* to = out + ((view * 3 + channel) * size + y) * size;
          if constexpr (std::is_same_v<T, float>) {
            own.mix(alone, terms.data(), used, rest, channel, y, size, stride, to);
          } else {
            own.mix(alone, terms.data(), used, rest, channel, y, size, stride, row.data());
            for (int64_t x = 0; x < size; ++x) to[x] = static_cast<T>(row[x]);
          }
        }
    }
  });
}

Tensor augmix(at::TensorList pictures, const Tensor& views, const Tensor& operations, const Tensor& matrices,
              const Tensor& weights, int64_t size, at::ArrayRef<double> mean, at::ArrayRef<double> std,
              at::ScalarType dtype, bool tall_first) {
  check_views(pictures, views, size);
  check_plan(views, operations, matrices, weights);
  const ViewLoops& loops = chosen_loops<ViewLoops>();
  const ChannelTables normalised(mean, std, loops);
  const Tensor table = views.contiguous(), codes = operations.contiguous(), values = matrices.contiguous(),
               shares = weights.contiguous();
  const View* rows = reinterpret_cast<const View*>(table.const_data_ptr<int64_t>());
  const Plan plan{operations.size(1), operations.size(2), codes.const_data_ptr<int64_t>(),
                  values.const_data_ptr<double>(), shares.const_data_ptr<float>()};
  const int64_t count = views.size(0);
  TORCH_CHECK_VALUE(size <= 16384, "size must be at most 16384 for AugMix, got ", size);
  Tensor out = empty_in_large_pages({count, 3, size, size}, dtype);
  if (count == 0) return out;
  const Planes planes(pictures, loops, row_slack(rows, count));
  const auto run = [&](auto* to) { make(planes, loops, normalised, rows, count, plan, size, tall_first, to); };
  switch (dtype) {
    case at::kFloat: run(out.mutable_data_ptr<float>()); break;
    case at::kBFloat16: run(out.mutable_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(out.mutable_data_ptr<at::Half>()); break;
    default: TORCH_CHECK_VALUE(false, "dtype must be float32, bfloat16 or float16, got ", dtype);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("augmix", &augmix); }

}  // namespace rada_fast
