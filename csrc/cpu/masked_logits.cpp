#include "masked_logits.h"

#include <ATen/Parallel.h>

#include "matrix_product.h"

namespace rada_fast {
namespace {

// The number of classes per tile: at most `most`, and fewer where the tiles of a few images must occupy all threads.
int64_t tile_width(const Problem& p, int64_t images, int64_t most) {
  const int64_t tiles = divide_up(2 * p.threads, images);
  return std::clamp<int64_t>(round_up(divide_up(p.classes, tiles), 16), 32, most);
}

// Computes O^T of a tile as an operand. The tile itself stays in `exact`, which float and double use as the operand.
template <typename T>
void attended_operand(const Problem& p, int64_t b, int64_t k0, int64_t columns, const Attended<Acc<T>>& state,
                      Acc<T>* exact, T* operand) {
  combine_attended<Acc<T>>(p, b, k0, columns, state, exact, columns);
  if (sizeof(T) == 2) chosen_loops<AdapterLoops<T>>().pack(exact, columns, nullptr, nullptr, p.width, columns, operand, columns);
}

template <typename T>
MaskRows<Acc<T>> mask_rows(const Problem& p, const OutputInputs<T>& in, int64_t b, int64_t r0, int64_t rows, int64_t k0,
                           int64_t columns, const Acc<T>* product) {
  return {product,   columns, rows, columns, in.bias ? in.bias + r0 : nullptr, in.image + b * p.width + r0,
          in.text + r0 * p.padded + k0, p.padded, p.relu, p.penalty};
}

template <typename A>
struct Peak {
  A value = -1;
  int64_t at = 0;
  // Whether a candidate is larger, or as large and earlier. A NaN is the largest value, as in torch.max.
  bool precedes(A candidate, int64_t where) const {
    const bool nan = value != value, candidate_nan = candidate != candidate;
    if (nan || candidate_nan) return candidate_nan && (!nan || where < at);
    return candidate > value || (candidate == value && where < at);
  }
  void offer(A candidate, int64_t where) {
    if (precedes(candidate, where)) {
      value = candidate;
      at = where;
    }
  }
};

}  // namespace

template <typename T>
void masked_logits_forward(const Problem& p, int64_t images, const OutputInputs<T>& in, const Attended<Acc<T>>& state,
                           Acc<T>* logits, double* penalty, int64_t* peak, Acc<T>* mask) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, width = tile_width(p, images, kClassTile), tiles = divide_up(p.classes, width);
  std::unique_ptr<double[]> sums(new double[static_cast<size_t>(images * tiles)]());
  std::unique_ptr<Peak<A>[]> peaks(new Peak<A>[static_cast<size_t>(images * tiles)]);
  at::parallel_for(0, images * tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    A* exact = scratch.take<A>(D * width);
    T* operand = sizeof(T) == 2 ? scratch.take<T>(round_up(D, 2) * width) : reinterpret_cast<T*>(exact);
    A* product = scratch.take<A>(kFeatureBlock * width);
    // The sums over blocks of features are added in double: one chain of D float additions would lose a digit.
    A* row = scratch.take<A>(width);
    double* totals = scratch.take<double>(width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, k0 = task % tiles * width, columns = std::min(width, p.classes - k0);
      attended_operand(p, b, k0, columns, state, exact, operand);
      std::fill(totals, totals + columns, 0.0);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        matrix_product<T>(rows, columns, D, in.weight + r0 * D, D, operand, columns, product, columns, false);
        const auto block = mask_rows(p, in, b, r0, rows, k0, columns, product);
        std::fill(row, row + columns, A(0));
        const A found = loops.mask_forward(block, row, mask ? mask + (b * D + r0) * p.classes + k0 : nullptr, p.classes);
        if (p.penalty == Penalty::linf) {
          Peak<A>& best = peaks[static_cast<size_t>(task)];
          if (best.precedes(found, k0 * D + r0)) {
            const int64_t at = loops.mask_find(block, found, D);
            best.offer(found, k0 * D + r0 + at);
          }
        } else {
          sums[static_cast<size_t>(task)] += static_cast<double>(found);
        }
        for (int64_t c = 0; c < columns; ++c) totals[c] += static_cast<double>(row[c]);
      }
      for (int64_t c = 0; c < columns; ++c) logits[b * p.classes + k0 + c] = static_cast<A>(totals[c]);
    }
  });
  if (p.penalty == Penalty::none) return;
  for (int64_t b = 0; b < images; ++b) {
    Peak<A> best;
    penalty[b] = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const auto task = static_cast<size_t>(b * tiles + tile);
      penalty[b] += sums[task];
      best.offer(peaks[task].value, peaks[task].at);
    }
    if (p.penalty == Penalty::linf) {
      penalty[b] = static_cast<double>(best.value);
      peak[b] = best.at;
    }
  }
}

template <typename T>
void masked_logits_backward(const Problem& p, int64_t images, const OutputInputs<T>& in, const Attended<Acc<T>>& state,
                            const OutputGradients<T>& out) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, width = tile_width(p, images, kQueryBlock), tiles = divide_up(p.classes, width);
  const A per_element = p.penalty == Penalty::linf ? A(0) : out.dpenalty;
  at::parallel_for(0, images * tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    A *exact = scratch.take<A>(D * width), *gradient = scratch.take<A>(D * width);
    T *operand = reinterpret_cast<T*>(exact), *gradient_operand = reinterpret_cast<T*>(gradient);
    if (sizeof(T) == 2) {
      operand = scratch.take<T>(D * width);
      gradient_operand = scratch.take<T>(D * width);
    }
    A* product = scratch.take<A>(kFeatureBlock * width);
    A* transposed = scratch.take<A>(D * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, k0 = task % tiles * width, columns = std::min(width, p.classes - k0);
      const int64_t padding = k0 + columns == p.classes ? p.padded - k0 : columns, at = b * p.image_size() + k0;
      attended_operand(p, b, k0, columns, state, exact, operand);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        matrix_product<T>(rows, columns, D, in.weight + r0 * D, D, operand, columns, product, columns, false);
        const auto block = mask_rows(p, in, b, r0, rows, k0, columns, product);
        A* weighted = out.weighted ? out.weighted + at + r0 * p.padded : nullptr;
        loops.mask_backward(block, out.dlogits + b * p.classes + k0, per_element,
                           out.dmask ? out.dmask + (b * D + r0) * p.classes + k0 : nullptr, p.classes,
                           gradient + r0 * columns, columns, weighted, p.padded);
        if (p.penalty == Penalty::linf) {
          const int64_t k = out.peak[b] / D - k0, r = out.peak[b] % D - r0;
          if (k >= 0 && k < columns && r >= 0 && r < rows) {
            const A offset = product[r * columns + k] + (in.bias ? in.bias[r0 + r] : A(0));
            const bool open = !p.relu || 1 + offset > 0;
            const A sign = offset > 0 ? A(1) : (offset < 0 ? A(-1) : A(0));
            if (open) gradient[(r0 + r) * columns + k] += sign * out.dpenalty;
          }
        }
      }
      if (out.doffset) loops.store(gradient, columns, nullptr, D, columns, padding, out.doffset + at, p.padded);
      if (out.attended) {
        // A tile starts at an even row, so both rows of a pair lie in the same tile. Rows past the last class are only
        // multiplied by zeros, and the row that completes an odd number is zero itself.
        loops.transpose_exact(exact, columns, D, columns, transposed, D);
        loops.pack(transposed, D, nullptr, nullptr, columns, D, out.attended + b * p.image_size() + k0 * D, D);
      }
      if (!out.dattended) continue;
      if (sizeof(T) == 2) loops.pack(gradient, columns, nullptr, nullptr, D, columns, gradient_operand, columns);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        matrix_product<T>(rows, columns, D, out.transposed + r0 * D, D, gradient_operand, columns, product, columns,
                          false);
        loops.store(product, columns, nullptr, rows, columns, padding, out.dattended + at + r0 * p.padded, p.padded);
      }
    }
  });
}

template <typename T>
void output_weight_gradients(const Problem& p, int64_t images, const T* doffset, const T* attended, Acc<T>* dweight,
                             Acc<T>* dbias, bool add) {
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, height = std::clamp<int64_t>(round_up(divide_up(D, 2 * p.threads), 16), 32, 128);
  const int64_t inner = sizeof(T) == 2 ? round_up(p.classes, 2) : p.classes;
  at::parallel_for(0, divide_up(D, height), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r0 = task * height, rows = std::min(height, D - r0);
      for (int64_t b = 0; b < images; ++b) {
        const T* gradient = doffset + b * p.image_size() + r0 * p.padded;
        // The classes are taken in blocks, so that the block of the operand stays in the cache for all rows.
        for (int64_t k0 = 0; dweight && k0 < inner; k0 += kClassTile)
          matrix_product<T>(rows, D, std::min(kClassTile, inner - k0), gradient + k0, p.padded,
                            attended + b * p.image_size() + k0 * D, D, dweight + r0 * D, D, add || b > 0 || k0 > 0);
        if (dbias) loops.row_sums(gradient, p.padded, rows, p.classes, dbias + r0);
      }
    }
  });
}

#define RADA_INSTANTIATE(T)                                                                                         \
  template void masked_logits_forward<T>(const Problem&, int64_t, const OutputInputs<T>&, const Attended<Acc<T>>&,  \
                                         Acc<T>*, double*, int64_t*, Acc<T>*);                                      \
  template void masked_logits_backward<T>(const Problem&, int64_t, const OutputInputs<T>&, const Attended<Acc<T>>&,  \
                                          const OutputGradients<T>&);                                               \
  template void output_weight_gradients<T>(const Problem&, int64_t, const T*, const T*, Acc<T>*, Acc<T>*, bool);
RADA_FACTOR_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE

}  // namespace rada_fast
