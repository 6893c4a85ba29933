#include "rational_projections.h"

#include <ATen/Parallel.h>

#include "matrix_product.h"

namespace rada_fast {

template <typename T>
void rational_projections(const Problem& p, int64_t images, const Acc<T>* image, const Acc<T>* text,
                          const Projection<T>* projections, int64_t count) {
  using A = Acc<T>;
  using F = Factor<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, tiles = divide_up(p.classes, kClassTile), blocks = divide_up(D, kFeatureBlock);
  // With few tiles, as for one image with few classes, the features are split as well; each part computes R again.
  const int64_t units = count * blocks;
  const int64_t parts = std::clamp<int64_t>(divide_up(4 * p.threads, images * tiles), 1, units);

  at::parallel_for(0, images * tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    F* rational = scratch.take<F>(round_up(D, 2) * kClassTile);
    A* product = scratch.take<A>(kFeatureBlock * kClassTile);
    A* scale = scratch.take<A>(D);
    int64_t formed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / parts % tiles, b = task / parts / tiles, part = task % parts;
      const int64_t k0 = tile * kClassTile, columns = std::min(kClassTile, p.classes - k0);
      const int64_t padded = k0 + columns == p.classes ? p.padded - k0 : columns;
      if (formed != task / parts) {
        for (int64_t c = 0; c < D; ++c) scale[c] = static_cast<A>(p.rational_scale) * image[b * D + c];
        loops.pack(text + k0, p.padded, scale, nullptr, D, columns, rational, columns);
        formed = task / parts;
      }
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const Projection<T>& projection = projections[unit / blocks];
        const int64_t r0 = unit % blocks * kFeatureBlock, rows = std::min(kFeatureBlock, D - r0);
        matrix_product<F>(rows, columns, D, projection.weight + r0 * D, D, rational, columns, product, columns, false);
        loops.store(product, columns, projection.bias ? projection.bias + r0 : nullptr, rows, columns, padded,
                   projection.out + b * p.image_size() + r0 * p.padded + k0, p.padded);
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
  constexpr int64_t depth = kQueryBlock;  // classes per operand
  const int64_t D = p.width;
  const int64_t height = std::clamp<int64_t>(round_up(divide_up(D, 2 * p.threads), 16), 32, 256);
  // A task owns some rows of every gradient: it computes R once for all of them, and no two tasks write to the same place.
  at::parallel_for(0, divide_up(D, height), 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    T* rational = scratch.take<T>(depth * D);
    A* scale = scratch.take<A>(D);
    for (int64_t b = 0; b < images; ++b) {
      for (int64_t c = 0; c < D; ++c) scale[c] = static_cast<A>(p.rational_scale) * image[b * D + c];
      for (int64_t k0 = 0; k0 < p.classes; k0 += depth) {
        const int64_t inner = std::min(depth, p.classes - k0);
        loops.pack(text_rows + k0 * D, D, nullptr, scale, inner, D, rational, D);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t r0 = task * height, rows = std::min(height, D - r0);
          for (int64_t w = 0; w < count; ++w) {
            const T* gradient = projections[w].gradient + b * p.image_size() + r0 * p.padded + k0;
            if (projections[w].dweight)
              matrix_product<T>(rows, D, sizeof(T) == 2 ? round_up(inner, 2) : inner, gradient, p.padded, rational, D,
                                projections[w].dweight + r0 * D, D, projections[w].add || b > 0 || k0 > 0);
            if (projections[w].dbias) loops.row_sums(gradient, p.padded, rows, inner, projections[w].dbias + r0);
          }
        }
      }
    }
  });
}

template <typename T>
void rational_matrix_gradients(const Problem& p, int64_t images, const Acc<T>* image, const Acc<T>* text,
                               const T* const* transposed, const T* const* gradients, int64_t count,
                               const Acc<T>* weighted, Acc<T>* dimage, Acc<T>* dtext) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t D = p.width, width = 64, tiles = divide_up(p.classes, width);
  std::unique_ptr<A[]> partial(new A[static_cast<size_t>(tiles * images * D)]());
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    T* operand = scratch.take<T>(count * round_up(D, 2) * width);
    A* product = scratch.take<A>(kFeatureBlock * width);
    for (int64_t tile = begin; tile < end; ++tile) {
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
