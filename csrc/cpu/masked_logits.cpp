#include "masked_logits.h"

#include "class_tiles.h"
#include "matrix_product.h"
#include "tasks.h"

namespace rada_fast {
namespace {

// The tiles of classes, with at most `most` in a tile, and fewer where the tiles of a few images must occupy all threads.
template <typename T>
ClassTiles tiles_of(const Problem& p, int64_t images, int64_t most) {
  const int64_t pitch = even<T>(p.classes), tiles = 2 * p.threads;
  return {p, images, std::clamp<int64_t>(round_up(divide_up(images * pitch, tiles), 16), 32, most), pitch};
}

// The arrays of a tile. O^T and the gradients are (D, columns) with the leading dimension ld.
template <typename T>
struct TileBuffers {
  using A = Acc<T>;
  A* exact;
  T* operand;  // O^T as an operand; for float and double it is `exact`
  A* product;  // (kFeatureBlock, columns)
  int64_t columns, ld;

  TileBuffers(const Problem& p, int64_t most, Scratch& scratch) {
    exact = scratch.take<A>(p.width * spread(most));
    operand = sizeof(T) == 2 ? scratch.take<T>(round_up(p.width, 2) * spread(most)) : reinterpret_cast<T*>(exact);
    product = scratch.take<A>(kFeatureBlock * spread(most));
  }

  // Turns to a tile. Computes its O^T, and the same as an operand, if a state is given.
  void load(const Problem& p, const ClassTiles& tiles, int64_t tile, const Attended<A>* state) {
    columns = whole_vectors(tiles.columns(tile));
    ld = spread(columns);
    if (!state) return;
    tiles.parts(tile, [&](const TilePart& part) {
      combine_attended<A>(p, part.image, part.first_class, part.columns, *state, exact + part.at, ld);
    });
    clear_columns(exact, ld, p.width, tiles.columns(tile), columns);
    if (sizeof(T) == 2)
      chosen_loops<AdapterLoops<T>>().pack(exact, ld, nullptr, nullptr, p.width, columns, operand, ld);
  }

  // Computes some rows of A without its bias.
  void multiply(const T* weight, int64_t r0, int64_t rows, int64_t width) {
    if (weight)
      matrix_product<T>(rows, columns, width, weight + r0 * width, width, operand, ld, product, ld, false);
    else
      std::fill(product, product + rows * ld, A(0));
  }

  MaskRows<A> mask_rows(const Problem& p, const OutputInputs<T>& in, const TilePart& part, int64_t r0,
                        int64_t rows) const {
    return {product + part.at, ld, rows, part.columns, in.bias ? in.bias + r0 : nullptr,
            in.image + part.image * p.width + r0, in.text + r0 * p.padded + part.first_class, p.padded, p.relu, p.penalty};
  }
};

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
                           Acc<T>* logits, double* penalty, int64_t* peak, Acc<T>* mask, Acc<T>* offset) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, pitch = even<T>(p.classes);
  const ClassTiles tiles = tiles_of<T>(p, images, kClassTile);
  // A tile and an image that it has a part of: the number tile + image belongs to no other two.
  const auto numbers = static_cast<size_t>(tiles.count() + images);
  std::unique_ptr<double[]> sums(new double[numbers]());
  std::unique_ptr<Peak<A>[]> peaks(new Peak<A>[numbers]);
  share_tasks(p.threads, tiles.count(), images * p.classes * D * D, [&](TaskQueue& queue) {
    Scratch& scratch = Scratch::rewound();
    TileBuffers<T> buffers(p, tiles.width(), scratch);
    // The sums over blocks of features are added in double: one chain of D float additions would lose a digit.
    A* row = scratch.take<A>(tiles.width());
    double* totals = scratch.take<double>(tiles.width());
    for (int64_t tile; queue.take(tile);) {
      buffers.load(p, tiles, tile, in.weight ? &state : nullptr);
      std::fill(totals, totals + tiles.width(), 0.0);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        buffers.multiply(in.weight, r0, rows, D);
        std::fill(row, row + tiles.width(), A(0));
        tiles.parts(tile, [&](const TilePart& part) {
          const int64_t b = part.image, k0 = part.first_class;
          const auto block = buffers.mask_rows(p, in, part, r0, rows);
          const A found =
              loops.mask_forward(block, row + part.at, mask ? mask + (b * D + r0) * p.classes + k0 : nullptr, p.classes);
          const auto number = static_cast<size_t>(tile + b);
          if (offset)
            loops.store_exact(block.offset, block.ld, nullptr, rows, part.columns, part.columns,
                              offset + b * p.image_size() + r0 * p.padded + k0, p.padded);
          if (p.penalty == Penalty::linf) {
            Peak<A>& best = peaks[number];
            if (best.precedes(found, k0 * D + r0)) {
              const int64_t at = loops.mask_find(block, found, D);
              best.offer(found, k0 * D + r0 + at);
            }
          } else {
            sums[number] += static_cast<double>(found);
          }
        });
        for (int64_t c = 0; c < tiles.columns(tile); ++c) totals[c] += static_cast<double>(row[c]);
      }
      tiles.parts(tile, [&](const TilePart& part) {
        A* to = logits + part.image * p.classes + part.first_class;
        for (int64_t c = 0; c < part.columns; ++c) to[c] = static_cast<A>(totals[part.at + c]);
      });
    }
  });
  if (p.penalty == Penalty::none) return;
  for (int64_t b = 0; b < images; ++b) {
    Peak<A> best;
    penalty[b] = 0;
    for (int64_t tile = b * pitch / tiles.width(); tile * tiles.width() < (b + 1) * pitch; ++tile) {
      const auto number = static_cast<size_t>(tile + b);
      penalty[b] += sums[number];
      best.offer(peaks[number].value, peaks[number].at);
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
  const int64_t D = p.width, pitch = even<T>(p.classes);
  const ClassTiles tiles = tiles_of<T>(p, images, kQueryBlock);
  const A per_element = p.penalty == Penalty::linf ? A(0) : out.dpenalty;
  share_tasks(p.threads, tiles.count(), 2 * images * p.classes * D * D, [&](TaskQueue& queue) {
    Scratch& scratch = Scratch::rewound();
    TileBuffers<T> buffers(p, tiles.width(), scratch);
    A *gradient = scratch.take<A>(D * spread(tiles.width())), *transposed = scratch.take<A>(D * tiles.width());
    T* gradient_operand = reinterpret_cast<T*>(gradient);
    if (sizeof(T) == 2) gradient_operand = scratch.take<T>(round_up(D, 2) * spread(tiles.width()));
    for (int64_t tile; queue.take(tile);) {
      buffers.load(p, tiles, tile, (in.weight && !out.offset) || out.attended ? &state : nullptr);
      const int64_t columns = buffers.columns, ld = buffers.ld;
      clear_columns(gradient, ld, D, tiles.columns(tile), columns);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        if (!out.offset) buffers.multiply(in.weight, r0, rows, D);
        tiles.parts(tile, [&](const TilePart& part) {
          const int64_t b = part.image, k0 = part.first_class, at = b * p.image_size() + k0;
          auto block = buffers.mask_rows(p, in, part, r0, rows);
          if (out.offset) {
            block.offset = out.offset + at + r0 * p.padded;
            block.ld = p.padded;
          }
          loops.mask_backward(block, out.dlogits + b * p.classes + k0, per_element,
                              out.dmask ? out.dmask + (b * D + r0) * p.classes + k0 : nullptr, p.classes,
                              gradient + r0 * ld + part.at, ld,
                              out.weighted ? out.weighted + at + r0 * p.padded : nullptr, p.padded);
          if (p.penalty == Penalty::linf) {
            const int64_t k = out.peak[b] / D - k0, r = out.peak[b] % D - r0;
            if (k >= 0 && k < part.columns && r >= 0 && r < rows) {
              const A offset = block.offset[r * block.ld + k] + (in.bias ? in.bias[r0 + r] : A(0));
              const bool open = !p.relu || 1 + offset > 0;
              const A sign = offset > 0 ? A(1) : (offset < 0 ? A(-1) : A(0));
              if (open) gradient[(r0 + r) * ld + part.at + k] += sign * out.dpenalty;
            }
          }
        });
      }
      tiles.parts(tile, [&](const TilePart& part) {
        if (out.doffset)
          loops.store(gradient + part.at, ld, nullptr, D, part.columns, part.stored(p),
                      out.doffset + part.image * p.image_size() + part.first_class, p.padded);
        if (out.attended) {
          T* to = out.attended + (part.image * pitch + part.first_class) * spread(D);
          // A part starts at an even row for bfloat16, so both rows of a pair lie in one part. A row of zeros completes an
          // odd number of rows.
          loops.transpose_exact(buffers.exact + part.at, ld, D, part.columns, transposed, D);
          loops.pack(transposed, D, nullptr, nullptr, part.columns, D, to, spread(D));
        }
      });
      if (!out.dattended) continue;
      if (sizeof(T) == 2) loops.pack(gradient, ld, nullptr, nullptr, D, columns, gradient_operand, ld);
      for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
        const int64_t rows = std::min(kFeatureBlock, D - r0);
        matrix_product<T>(rows, columns, D, out.transposed + r0 * D, D, gradient_operand, ld, buffers.product, ld, false);
        tiles.parts(tile, [&](const TilePart& part) {
          loops.store(buffers.product + part.at, ld, nullptr, rows, part.columns, part.stored(p),
                      out.dattended + part.image * p.image_size() + part.first_class + r0 * p.padded, p.padded);
        });
      }
    }
  });
}

template <typename T>
void output_weight_gradients(const Problem& p, int64_t images, const T* doffset, const T* attended, Acc<T>* dweight,
                             Acc<T>* dbias, bool add) {
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, ld = spread(D), pitch = even<T>(p.classes);
  const ClassTiles tiles(p, images, kClassTile, pitch);
  const int64_t height = std::clamp<int64_t>(round_up(divide_up(D, 2 * p.threads), 16), 32, 128);
  share_tasks(p.threads, divide_up(D, height), images * p.classes * D * D, [&](TaskQueue& queue) {
    T* copy = Scratch::rewound().take<T>(height * kClassTile);
    for (int64_t task; queue.take(task);) {
      const int64_t r0 = task * height, rows = std::min(height, D - r0);
      // The operand of a tile of classes stays in the cache for all rows.
      for (int64_t tile = 0; dweight && tile < tiles.count(); ++tile) {
        int64_t ldg;
        const T* gradient = tiles.left_rows(p, tile, doffset, r0, rows, copy, ldg);
        matrix_product<T>(rows, D, tiles.columns(tile), gradient, ldg, attended + tile * kClassTile * ld, ld,
                          dweight + r0 * D, D, add || tile > 0);
      }
      for (int64_t b = 0; dbias && b < images; ++b)
        loops.row_sums(doffset + b * p.image_size() + r0 * p.padded, p.padded, rows, p.classes, dbias + r0);
    }
  });
}

#define RADA_INSTANTIATE(T)                                                                                         \
  template void masked_logits_forward<T>(const Problem&, int64_t, const OutputInputs<T>&, const Attended<Acc<T>>&,  \
                                         Acc<T>*, double*, int64_t*, Acc<T>*, Acc<T>*);                             \
  template void masked_logits_backward<T>(const Problem&, int64_t, const OutputInputs<T>&, const Attended<Acc<T>>&,  \
                                          const OutputGradients<T>&);                                               \
  template void output_weight_gradients<T>(const Problem&, int64_t, const T*, const T*, Acc<T>*, Acc<T>*, bool);
RADA_FACTOR_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE

}  // namespace rada_fast
