// The attention's backward: probabilities are formed again from the saved log-sums, tile by tile.
//
// With P' = P / |Q| and dP = dO vv^T:   dvv += (sum_c P'^c)^T dO,   dS^c = P'^c (dP - delta^c) / (sqrt(d) tau),
//     dkk += dS^c^T q^c,   dq^c = dS^c kk,   delta^c = dO_i . O^c_i, or its mean over the queries (matrix softmax).
// A thread owns a head, or a fixed share of its query blocks whose sums are added in order: no atomics.
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "attention_tiles.h"
#include "matrix_product.h"

namespace rada_fast {
namespace {

template <typename T>
struct Backward {
  using A = Acc<T>;
  using F = Factor<T>;
  const Problem& p;
  const AttentionState<T>& state;
  const AttentionGradients<T>& out;
  const AdapterLoops<T>& loops = chosen_loops<AdapterLoops<T>>();
  const AdapterLoops<F>& factors = chosen_loops<AdapterLoops<F>>();  // the same, of what is in a product's type already
  const int64_t d = p.head_width, wide = p.wide_kinds();
  const bool need_scores = out.dkeys || out.drational_query || out.dtext_query || out.dimage_query;

  int64_t offset(int64_t b, int64_t h) const { return b * p.image_size() + h * d * p.padded; }

  // delta of one kind for every query of a head, into (padded).
  void deltas(int64_t b, int64_t h, int64_t kind, A* delta) const {
    const int64_t head = b * p.heads + h;
    std::fill(delta, delta + p.padded, A(0));
    loops.column_dots(out.doutput + offset(b, h), state.attended[kind] + offset(b, h), p.padded, d, p.classes, delta);
    // The factors hold 1 / |Q|, which P' has already.
    for (int64_t k = 0; k < p.classes; ++k)
      delta[k] *= state.factors[kind][head * p.query_blocks + k / kQueryBlock] * static_cast<A>(p.kinds());
    if (p.matrix_softmax)
      std::fill(delta, delta + p.classes,
                static_cast<A>(std::accumulate(delta, delta + p.classes, 0.0) / static_cast<double>(p.classes)));
  }

  void wide_queries(int64_t b, int64_t h, int64_t first, int64_t last, A* dkeys, A* dvalues, Scratch& scratch) const {
    const int64_t head = b * p.heads + h, at = offset(b, h), most = wide * kQueryBlock;
    const A scale = static_cast<A>(p.score_scale);
    F *key_rows = scratch.take<F>(p.padded * d), *value_rows = scratch.take<F>(p.padded * d);
    F *queries = scratch.take<F>(d * most), *query_rows = scratch.take<F>(d * most);
    F *doutput = scratch.take<F>(d * kQueryBlock), *doutput_rows = scratch.take<F>(d * kQueryBlock);
    A *scores = scratch.take<A>(kKeyBlock * most), *dprobabilities = scratch.take<A>(kKeyBlock * kQueryBlock);
    A *total = scratch.take<A>(kKeyBlock * kQueryBlock), *dqueries = scratch.take<A>(d * most);
    A *delta = scratch.take<A>(2 * p.padded), *shift = scratch.take<A>(most), *weight = scratch.take<A>(most);
    F *dscores_rows = reinterpret_cast<F*>(scores), *dscores = dscores_rows, *total_rows = reinterpret_cast<F*>(total);
    if (sizeof(F) == 2) {
      dscores_rows = scratch.take<F>(kKeyBlock * most);
      dscores = scratch.take<F>(kKeyBlock * most);
      total_rows = scratch.take<F>(kKeyBlock * kQueryBlock);
    }
    loops.transpose(state.keys + at, p.padded, d, p.classes, key_rows, d);
    loops.transpose(state.values + at, p.padded, d, p.classes, value_rows, d);
    const F* keys = nullptr;
    if (out.dtext_query || out.drational_query)
      keys = left_factor(state.keys + at, p.padded, d, scratch.take<F>(left_factor_size<T>(p.padded * d)));
    for (int64_t kind = 0; kind < wide; ++kind) deltas(b, h, kind, delta + kind * p.padded);

    for (int64_t block = first; block < last; ++block) {
      const int64_t q0 = block * kQueryBlock, exact = std::min(kQueryBlock, p.classes - q0), width = even<F>(exact);
      const int64_t columns = wide * width;
      pack_queries(p, state, b, h, q0, width, queries, columns);
      factors.pack_stored(out.doutput + at + q0, p.padded, d, width, doutput, width);
      factors.pack_transposed(out.doutput + at + q0, p.padded, d, width, doutput_rows, d);
      for (int64_t kind = 0; kind < wide; ++kind) {
        const T* query = kind == 0 && p.text ? state.text_query + h * d * p.padded : state.rational_query + at;
        loops.pack_transposed(query + q0, p.padded, d, width, query_rows + kind * width * d, d);
        for (int64_t c = 0; c < exact; ++c) {
          const int64_t of = p.matrix_softmax ? head : head * p.padded + q0 + c;
          shift[kind * width + c] = state.maxima[kind][of];
          weight[kind * width + c] = state.weights[kind][of];
        }
        for (int64_t c = exact; c < width; ++c) {
          shift[kind * width + c] = std::numeric_limits<A>::infinity();
          weight[kind * width + c] = 0;
        }
      }
      for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock) {
        const int64_t rows = std::min(kKeyBlock, p.classes - n0);
        matrix_product<F>(rows, columns, d, key_rows + n0 * d, d, queries, columns, scores, columns, false);
        matrix_product<F>(rows, width, d, value_rows + n0 * d, d, doutput, width, dprobabilities, width, false);
        for (int64_t kind = 0; kind < wide; ++kind)
          loops.score_gradients(scores + kind * width, columns, dprobabilities, total, width, rows, width, scale,
                               shift + kind * width, weight + kind * width, delta + kind * p.padded + q0, kind == 0);
        if (dvalues) {
          if (sizeof(F) == 2) factors.store(total, width, nullptr, rows, width, width, total_rows, width);
          matrix_product<F>(rows, d, width, total_rows, width, doutput_rows, d, dvalues + n0 * d, d, block > first);
        }
        if (!need_scores) continue;
        if (sizeof(F) == 2) {
          factors.store(scores, columns, nullptr, rows, columns, columns, dscores_rows, columns);
          factors.pack_stored(dscores_rows, columns, rows, columns, dscores, columns);
        }
        if (dkeys)
          matrix_product<F>(rows, d, columns, dscores_rows, columns, query_rows, d, dkeys + n0 * d, d, block > first);
        if (out.dtext_query || out.drational_query)
          matrix_product<F>(d, columns, even<F>(rows), keys + n0, p.padded, dscores, columns, dqueries,
                            columns, n0 > 0);
      }
      const int64_t padding = q0 + exact == p.classes ? p.padded - q0 : exact;
      if (out.dtext_query)
        for (int64_t r = 0; r < d; ++r) {
          A* to = out.dtext_query + at + r * p.padded + q0;
          std::copy(dqueries + r * columns, dqueries + r * columns + exact, to);
          std::fill(to + exact, to + padding, A(0));
        }
      if (out.drational_query)
        factors.store(dqueries + (wide - 1) * width, columns, nullptr, d, exact, padding,
                   out.drational_query + at + q0, p.padded);
    }
  }

  // The image query's one row, added to the head's sums over the wide queries.
  void image_query(int64_t b, int64_t h, A* dkeys, A* dvalues, Scratch& scratch) const {
    const int64_t at = offset(b, h), row = b * p.width + h * d;
    const A scale = static_cast<A>(p.score_scale), share = A(1) / static_cast<A>(p.kinds());
    A *probability = scratch.take<A>(p.padded), *dscore = scratch.take<A>(p.padded), *doutput = scratch.take<A>(d);
    std::fill(doutput, doutput + d, A(0));
    loops.row_sums(out.doutput + at, p.padded, d, p.classes, doutput);
    double* exact = scratch.take<double>(p.padded);
    std::fill(exact, exact + p.classes, 0.0);
    loops.add_scaled_rows(state.keys + at, p.padded, state.image_query + row, d, p.classes, exact);
    for (int64_t k = 0; k < p.classes; ++k) probability[k] = static_cast<A>(exact[k]);
    loops.softmax(probability, p.classes, scale);
    for (int64_t k = 0; k < p.classes; ++k) probability[k] *= share;
    if (dvalues) loops.add_outer(probability, doutput, p.classes, d, dvalues, d);
    if (!need_scores) return;
    std::fill(exact, exact + p.classes, 0.0);
    loops.add_scaled_rows(state.values + at, p.padded, doutput, d, p.classes, exact);
    // From the same probabilities, so that the gradients of a row add up to zero.
    double sum = 0;
    for (int64_t k = 0; k < p.classes; ++k) sum += static_cast<double>(probability[k]) * exact[k];
    const double delta = sum * static_cast<double>(p.kinds());
    for (int64_t k = 0; k < p.classes; ++k) dscore[k] = scale * probability[k] * static_cast<A>(exact[k] - delta);
    if (dkeys) loops.add_outer(dscore, state.image_query + row, p.classes, d, dkeys, d);
    if (out.dimage_query) {
      std::fill(out.dimage_query + row, out.dimage_query + row + d, A(0));
      loops.row_dots(state.keys + at, p.padded, dscore, d, p.classes, out.dimage_query + row);
    }
  }

  void finish(int64_t b, int64_t h, A* dkeys, A* dvalues, Scratch& scratch) const {
    if (p.image) image_query(b, h, dkeys, dvalues, scratch);
    A* turned = scratch.take<A>(d * p.padded);
    const auto put = [&](const A* sums, F* to) {
      if (!to) return;
      loops.transpose_exact(sums, d, p.classes, d, turned, p.padded);
      factors.store(turned, p.padded, nullptr, d, p.classes, p.padded, to + offset(b, h), p.padded);
    };
    put(dkeys, out.dkeys);
    put(dvalues, out.dvalues);
  }
};

}  // namespace

template <typename T>
void class_attention_backward(const Problem& p, int64_t images, const AttentionState<T>& state,
                              const AttentionGradients<T>& out) {
  using A = Acc<T>;
  const Backward<T> backward{p, state, out};
  const int64_t heads = images * p.heads, size = p.classes * p.head_width, blocks = p.query_blocks;
  const int64_t parts = p.wide_kinds() ? splits(p, images) : 1;
  std::unique_ptr<A[]> shared(parts > 1 ? new A[static_cast<size_t>(2 * heads * parts * size)] : nullptr);

  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Scratch& scratch = Scratch::rewound();
      const int64_t head = task / parts, part = task % parts, b = head / p.heads, h = head % p.heads;
      A* sums = shared ? shared.get() + 2 * task * size : scratch.take<A>(2 * size);
      A *dkeys = out.dkeys ? sums : nullptr, *dvalues = out.dvalues ? sums + size : nullptr;
      if (p.wide_kinds())
        backward.wide_queries(b, h, part * blocks / parts, (part + 1) * blocks / parts, dkeys, dvalues, scratch);
      else
        std::fill(sums, sums + 2 * size, A(0));
      if (!shared) backward.finish(b, h, dkeys, dvalues, scratch);
    }
  });
  if (!shared) return;

  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      A* sums = shared.get() + 2 * head * parts * size;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < 2 * size; ++i) sums[i] += sums[2 * part * size + i];
      backward.finish(head / p.heads, head % p.heads, out.dkeys ? sums : nullptr, out.dvalues ? sums + size : nullptr,
                      Scratch::rewound());
    }
  });
}

#define RADA_INSTANTIATE(T)                                                                      \
  template void class_attention_backward<T>(const Problem&, int64_t, const AttentionState<T>&,   \
                                            const AttentionGradients<T>&);
RADA_INSTANTIATE(float)
RADA_INSTANTIATE(double)
RADA_INSTANTIATE(BF16)
RADA_INSTANTIATE(WideBF16)
#undef RADA_INSTANTIATE

}  // namespace rada_fast
