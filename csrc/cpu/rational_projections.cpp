#include "rational_projections.h"

#include "class_tiles.h"
#include "matrix_product.h"
#include "tasks.h"

namespace rada_fast {

template <typename T>
void rational_projections(const Problem& p, int64_t images, const Acc<T>* image, const Acc<T>* text,
                          const Projection<T>* projections, int64_t count) {
  using A = Acc<T>;
  using F = Factor<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, blocks = divide_up(D, kFeatureBlock), units = count * blocks;
  const ClassTiles tiles(p, images, kClassTile, p.classes);
  // With few tiles, as for one image with few classes, the features are split as well; each part computes R again.
  const int64_t parts = std::clamp<int64_t>(divide_up(4 * p.threads, std::max<int64_t>(tiles.count(), 1)), 1, units);

  const int64_t pieces = std::min<int64_t>(4, divide_up(units, parts)), of_tile = parts * pieces;
  const GroupedTasks grouped(tiles.count() * parts, pieces, p.threads);

  share_tasks(p.threads, grouped.count, count * images * p.classes * D * D, [&](TaskQueue& queue) {
    Scratch& scratch = Scratch::rewound();
    F* rational = scratch.take<F>(round_up(D, 2) * spread(kClassTile));
    A* product = scratch.take<A>(kFeatureBlock * spread(kClassTile));
    A* scale = scratch.take<A>(D);
    int64_t formed = -1;
    for (int64_t task; queue.take(task);) {
      const int64_t tile = grouped.first(task) / of_tile;
      const int64_t first = grouped.first(task) - tile * of_tile, last = grouped.last(task) - tile * of_tile;
      const int64_t columns = whole_vectors(tiles.columns(tile)), ld = spread(columns);
      if (formed != tile) {
        tiles.parts(tile, [&](const TilePart& of) {
          for (int64_t c = 0; c < D; ++c) scale[c] = static_cast<A>(p.rational_scale) * image[of.image * D + c];
          loops.pack(text + of.first_class, p.padded, scale, nullptr, D, of.columns, rational + of.at * even<F>(1), ld);
        });
        clear_columns(rational, ld, D, tiles.columns(tile), columns);
        formed = tile;
      }
      for (int64_t unit = first * units / of_tile; unit < last * units / of_tile; ++unit) {
        const Projection<T>& projection = projections[unit / blocks];
        const int64_t r0 = unit % blocks * kFeatureBlock, rows = std::min(kFeatureBlock, D - r0);
        matrix_product<F>(rows, columns, D, projection.weight + r0 * D, D, rational, ld, product, ld, false);
        tiles.parts(tile, [&](const TilePart& of) {
          loops.store(product + of.at, ld, projection.bias ? projection.bias + r0 : nullptr, rows, of.columns,
                      of.stored(p), projection.out + of.image * p.image_size() + r0 * p.padded + of.first_class, p.padded);
        });
      }
    }
  });
}

template <typename T>
void rational_projection_gradients(const Problem& p, int64_t images, const Acc<T>* image, const Acc<T>* text_rows,
                                   const ProjectionGradient<T>* projections, int64_t count) {
  using A = Acc<T>;
  if (count == 0) return;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, ld = spread(D), pitch = even<T>(p.classes);
  const ClassTiles tiles(p, images, kQueryBlock, pitch);
  const int64_t height = std::clamp<int64_t>(round_up(divide_up(D, 2 * p.threads), 16), 32, 256);
  // A task owns some rows of every gradient: it computes R once for all of them, and no two tasks write to the same place.
  const auto worker = [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    T *rational = scratch.take<T>(kQueryBlock * ld), *copy = scratch.take<T>(height * kQueryBlock);
    A* scale = scratch.take<A>(D);
    for (int64_t tile = 0; tile < tiles.count(); ++tile) {
      tiles.parts(tile, [&](const TilePart& part) {
        for (int64_t c = 0; c < D; ++c) scale[c] = static_cast<A>(p.rational_scale) * image[part.image * D + c];
        loops.pack(text_rows + part.first_class * D, D, nullptr, scale, part.columns, D, rational + part.at * ld, ld);
      });
      for (int64_t task = begin; task < end; ++task) {
        const int64_t r0 = task * height, rows = std::min(height, D - r0);
        for (int64_t w = 0; w < count; ++w) {
          const ProjectionGradient<T>& projection = projections[w];
          if (projection.dweight) {
            int64_t ldg;
            const T* gradient = tiles.left_rows(p, tile, projection.gradient, r0, rows, copy, ldg);
            matrix_product<T>(rows, D, tiles.columns(tile), gradient, ldg, rational, ld, projection.dweight + r0 * D, D,
                              projection.add || tile > 0);
          }
          if (projection.dbias)
            tiles.parts(tile, [&](const TilePart& part) {
              loops.row_sums(projection.gradient + part.image * p.image_size() + r0 * p.padded + part.first_class,
                             p.padded, rows, part.columns, projection.dbias + r0);
            });
        }
      }
    }
  };
  at::parallel_for(0, divide_up(D, height), 1, worker);
}

template <typename T>
void rational_matrix_gradients(const Problem& p, int64_t images, const Acc<T>* image, const Acc<T>* text,
                               const T* const* transposed, const T* const* gradients, int64_t count,
                               const Acc<T>* weighted, Acc<T>* dimage, Acc<T>* dtext) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, width = 64, tiles = divide_up(p.classes, width);
  std::unique_ptr<A[]> partial(new A[static_cast<size_t>(tiles * images * D)]());
  share_tasks(p.threads, tiles, (count + 1) * images * p.classes * D * D, [&](TaskQueue& queue) {
    Scratch& scratch = Scratch::rewound();
    T* operand = scratch.take<T>(count * round_up(D, 2) * width);
    A* product = scratch.take<A>(kFeatureBlock * width);
    for (int64_t tile; queue.take(tile);) {
      const int64_t k0 = tile * width, columns = std::min(width, p.classes - k0);
      for (int64_t b = 0; b < images; ++b) {
        const int64_t at = b * p.image_size() + k0;
        for (int64_t w = 0; w < count; ++w)
          loops.pack_stored(gradients[w] + at, p.padded, D, columns, operand + w * D * width, columns);
        for (int64_t r0 = 0; r0 < D; r0 += kFeatureBlock) {
          const int64_t rows = std::min(kFeatureBlock, D - r0);
          if (count == 0) std::fill(product, product + rows * columns, A(0));
          for (int64_t w = 0; w < count; ++w)
            matrix_product<T>(rows, columns, D, transposed[w] + r0 * D, D, operand + w * D * width, columns, product,
                              columns, w > 0);
          loops.feature_gradients(product, columns, static_cast<A>(p.rational_scale), weighted + at + r0 * p.padded,
                                 p.padded, text + r0 * p.padded + k0, p.padded, image + b * D + r0, rows, columns,
                                 partial.get() + (tile * images + b) * D + r0, dtext + r0 * p.padded + k0, p.padded);
        }
      }
    }
  });
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t i = 0; i < images * D; ++i) dimage[i] += partial[static_cast<size_t>(tile * images * D + i)];
}

#define RADA_INSTANTIATE(T)                                                                                          \
  template void rational_projection_gradients<T>(const Problem&, int64_t, const Acc<T>*, const Acc<T>*,              \
                                                 const ProjectionGradient<T>*, int64_t);                             \
  template void rational_matrix_gradients<T>(const Problem&, int64_t, const Acc<T>*, const Acc<T>*, const T* const*, \
                                             const T* const*, int64_t, const Acc<T>*, Acc<T>*, Acc<T>*);
RADA_FACTOR_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE
#define RADA_INSTANTIATE(T)                                                                                          \
  template void rational_projections<T>(const Problem&, int64_t, const Acc<T>*, const Acc<T>*, const Projection<T>*, \
                                        int64_t);
RADA_STORED_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE

}  // namespace rada_fast
