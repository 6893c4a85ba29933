// The attention's backward pass. Probabilities are computed again, tile by tile, from the saved maxima and weights.
//
// For query kind c, with P' = P / |Q| and dP = dO vv^T:
//     dvv += (sum_c P'^c)^T dO,   dS^c = P'^c (dP - delta^c) / (sqrt(d) tau),   dkk += dS^c^T q^c,   dq^c = dS^c kk
// delta^c_i is dO_i . O^c_i for query i, or the mean of these over the queries (matrix softmax). class_attention.h
// explains the other symbols. A thread owns a head, or a fixed part of its query blocks. The sums of the parts are
// added in order, without atomics.
#include <cmath>
#include <limits>
#include <numeric>

#include "attention_tiles.h"
#include "matrix_product.h"
#include "score_loops.h"
#include "tasks.h"

namespace rada_fast {
namespace {

// One thread's arrays while it works on the blocks of one head. Arrays whose names end in _rows have plain rows, as left
// factors of products; the others of type F are operands, the right factors.
template <typename T>
struct HeadBuffers {
  using A = Acc<T>;
  using F = Factor<T>;
  // These belong to the head.
  F *key_rows, *value_rows;  // (classes, d)
  const F* keys;             // (d, padded); null where no query per class needs a gradient
  A* delta;                  // (kinds, padded)
  // These belong to a block of queries, kind after kind.
  F *queries, *query_rows;    // (d, columns), (columns, d)
  F *doutput, *doutput_rows;  // (d, width), (width, d)
  A *maximum, *weight;        // (columns)
  A* dqueries;                // (d, columns)
  // These belong to a tile of keys and queries.
  A *scores, *dprobabilities;  // (keys, columns), (keys, width)
  A* total;                    // sum of P' over the kinds, (keys, width)
  A* probabilities;            // (keys, columns), with merged kinds alone; scores and dprobabilities then hold all keys
  A* sums;                     // (columns)
  F *dscores_rows, *dscores, *total_rows;  // for float and double these are the arrays of the scores and the total

  HeadBuffers(const Problem& p, Scratch& scratch) {
    const int64_t d = p.head_width, most = spread(p.per_class_kinds() * kQueryBlock), width = spread(kQueryBlock);
    key_rows = scratch.take<F>(p.padded * d);
    value_rows = scratch.take<F>(p.padded * d);
    keys = nullptr;
    queries = scratch.take<F>(d * most);
    query_rows = scratch.take<F>(spread(d) * most);
    doutput = scratch.take<F>(d * width);
    doutput_rows = scratch.take<F>(spread(d) * width);
    scores = scratch.take<A>((p.merged ? p.padded : kKeyBlock) * most);
    dprobabilities = scratch.take<A>(p.merged ? p.padded * most : kKeyBlock * width);
    probabilities = scratch.take<A>(p.merged ? kKeyBlock * most : 0);
    sums = scratch.take<A>(2 * most);
    total = scratch.take<A>(kKeyBlock * (p.merged ? most : width));
    dqueries = scratch.take<A>(d * most);
    delta = scratch.take<A>(2 * p.padded);
    maximum = scratch.take<A>(most);
    weight = scratch.take<A>(most);
    if (sizeof(F) == 2) {
      dscores_rows = scratch.take<F>(kKeyBlock * most);
      dscores = scratch.take<F>(kKeyBlock * most);
      total_rows = scratch.take<F>(kKeyBlock * width);
    } else {
      dscores_rows = dscores = reinterpret_cast<F*>(scores);
      total_rows = reinterpret_cast<F*>(total);
    }
  }
};

// A block of queries: `exact` queries of each kind from q0 on, in `width` columns, an even number for bfloat16.
struct QueryBlock {
  int64_t q0, exact, width, columns;
  bool first;  // whether it is the first block of its task
  int64_t ld, ld_width;  // the leading dimensions of tiles with `columns` and with `width` columns
};

template <typename T>
class Backward {
 public:
  using A = Acc<T>;
  using F = Factor<T>;

  Backward(const Problem& problem, const AttentionState<T>& attention, const AttentionGradients<T>& gradients)
      : p(problem), state(attention), out(gradients) {}

  // Handles the kinds that have a query per class: sums a head's dkeys and dvalues (each (classes, d), or null) over the
  // blocks from first to last, and stores the gradients of these blocks' queries.
  void per_class_queries(int64_t b, int64_t h, int64_t first, int64_t last, A* dkeys, A* dvalues,
                         Scratch& scratch) const {
    HeadBuffers<T> buffers(p, scratch);
    load_head(b, h, buffers, scratch);
    for (int64_t number = first; number < last; ++number) {
      const int64_t q0 = number * kQueryBlock, exact = std::min(kQueryBlock, p.classes - q0), width = even<F>(exact);
      const int64_t columns = kinds * width, ld = spread(columns);
      const QueryBlock block{q0, exact, width, columns, number == first, ld, p.merged ? ld : spread(width)};
      load_block(b, h, block, buffers);
      if (p.merged) merged_deltas(block, buffers);
      for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock)
        tile(block, n0, std::min(kKeyBlock, p.classes - n0), buffers, dkeys, dvalues);
      store_queries(b, h, block, buffers);
    }
  }

  // Adds the contribution of the image query, a single row, to a head's dkeys and dvalues.
  void image_query(int64_t b, int64_t h, A* dkeys, A* dvalues, Scratch& scratch) const {
    if (p.image) single_row(b, h, dkeys, dvalues, scratch);
  }

  // Stores features c0 to c0 + columns of a head's dkeys and dvalues. The sums of `parts` tasks are added up in order:
  // each is (dkeys, dvalues), both (classes, d), one task after the other.
  void finish(int64_t b, int64_t h, int64_t c0, int64_t columns, const A* sums, int64_t parts, Scratch& scratch) const {
    const int64_t size = p.classes * d, to = offset(b, h) + c0 * p.padded;
    A* transposed = scratch.take<A>(columns * p.padded);
    A* added = parts > 1 ? scratch.take<A>(p.classes * columns) : nullptr;
    const auto store = [&](const A* from, F* out_of_head) {
      if (!out_of_head) return;
      if (added) loops.combine(from + c0, d, 1, nullptr, p.classes, columns, added, columns, true);
      for (int64_t part = 1; part < parts; ++part)
        loops.combine(from + 2 * part * size + c0, d, 1, nullptr, p.classes, columns, added, columns, false);
      loops.transpose_exact(added ? added : from + c0, added ? columns : d, p.classes, columns, transposed, p.padded);
      factors.store(transposed, p.padded, nullptr, columns, p.classes, p.padded, out_of_head + to, p.padded);
    };
    store(sums, out.dkeys);
    store(sums + size, out.dvalues);
  }

 private:
  const Problem& p;
  const AttentionState<T>& state;
  const AttentionGradients<T>& out;
  const AdapterLoops<T>& loops = chosen_loops<AdapterLoops<T>>();
  const ScoreLoops<T>& score_loops = chosen_loops<ScoreLoops<T>>();
  const AdapterLoops<F>& factors = chosen_loops<AdapterLoops<F>>();  // for arrays that a product multiplies
  const int64_t d = p.head_width, kinds = p.per_class_kinds();
  const A scale = static_cast<A>(p.score_scale);
  const bool need_queries = out.dtext_query || out.drational_query;
  const bool need_scores = need_queries || out.dkeys || out.dimage_query;

  int64_t offset(int64_t b, int64_t h) const { return b * p.image_size() + h * d * p.padded; }

  // Writes delta of one kind for every query of a head, (padded).
  void deltas(int64_t b, int64_t h, int64_t kind, A* delta) const {
    const int64_t head = b * p.heads + h;
    std::fill(delta, delta + p.padded, A(0));
    loops.column_dots(out.doutput + offset(b, h), state.attended[kind] + offset(b, h), p.padded, d, p.classes, delta);
    // The factors include 1 / |Q|, which P' includes already.
    for (int64_t k = 0; k < p.classes; ++k)
      delta[k] *= state.factors[kind][head * p.query_blocks + k / kQueryBlock] * static_cast<A>(p.kinds());
    if (p.matrix_softmax)
      std::fill(delta, delta + p.classes,
                static_cast<A>(std::accumulate(delta, delta + p.classes, 0.0) / static_cast<double>(p.classes)));
  }

  void load_head(int64_t b, int64_t h, HeadBuffers<T>& buffers, Scratch& scratch) const {
    const int64_t at = offset(b, h);
    loops.transpose(state.keys + at, p.padded, d, p.classes, buffers.key_rows, d);
    loops.transpose(state.values + at, p.padded, d, p.classes, buffers.value_rows, d);
    if (need_queries)
      buffers.keys = left_factor(state.keys + at, p.padded, d, scratch.take<F>(left_factor_size<T>(p.padded * d)));
    for (int64_t kind = 0; kind < kinds && !p.merged; ++kind) deltas(b, h, kind, buffers.delta + kind * p.padded);
  }

  void load_block(int64_t b, int64_t h, const QueryBlock& block, const HeadBuffers<T>& buffers) const {
    const int64_t head = b * p.heads + h, at = offset(b, h), q0 = block.q0, width = block.width;
    pack_queries(p, state, b, h, q0, width, buffers.queries, block.ld);
    factors.pack_stored(out.doutput + at + q0, p.padded, d, width, buffers.doutput, spread(width));
    factors.pack_transposed(out.doutput + at + q0, p.padded, d, width, buffers.doutput_rows, spread(d));
    for (int64_t kind = 0; kind < kinds; ++kind) {
      const T* query = kind == 0 && p.text ? state.text_query + h * d * p.padded : state.rational_query + at;
      loops.pack_transposed(query + q0, p.padded, d, width, buffers.query_rows + kind * width * spread(d), spread(d));
      A *maximum = buffers.maximum + kind * width, *weight = buffers.weight + kind * width;
      for (int64_t c = 0; c < block.exact; ++c) {
        const int64_t from = p.matrix_softmax ? head : head * p.padded + q0 + c;
        maximum[c] = state.maxima[kind][from];
        weight[c] = state.weights[kind][from];
      }
      for (int64_t c = block.exact; c < width; ++c) {
        maximum[c] = std::numeric_limits<A>::infinity();
        weight[c] = 0;
      }
    }
  }

  // Computes S and dP of a block of queries with `rows` keys from n0 on.
  void products(const QueryBlock& block, int64_t n0, int64_t rows, const HeadBuffers<T>& buffers, A* scores,
                A* dprobabilities) const {
    matrix_product<F>(rows, block.columns, d, buffers.key_rows + n0 * d, d, buffers.queries, block.ld, scores, block.ld,
                      false);
    matrix_product<F>(rows, block.width, d, buffers.value_rows + n0 * d, d, buffers.doutput,
                      spread(block.width), dprobabilities, block.ld_width, false);
  }

  // Computes S and dP with all keys, and delta of merged kinds: the sum of P dP over the keys.
  void merged_deltas(const QueryBlock& block, const HeadBuffers<T>& buffers) const {
    const int64_t width = block.width, columns = block.columns, ld = block.ld;
    A *ignored = buffers.sums, *sums = ignored + columns;
    for (int64_t kind = 0; kind < kinds; ++kind)
      std::fill_n(buffers.delta + kind * p.padded + block.q0, block.exact, A(0));
    for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock) {
      const int64_t rows = std::min(kKeyBlock, p.classes - n0);
      A *scores = buffers.scores + n0 * ld, *dprobabilities = buffers.dprobabilities + n0 * ld;
      products(block, n0, rows, buffers, scores, dprobabilities);
      if (!need_scores) continue;
      std::copy(scores, scores + rows * ld, buffers.probabilities);
      std::fill(ignored, ignored + 2 * columns, A(0));
      const auto probabilities = reinterpret_cast<F*>(buffers.probabilities);
      score_loops.exponentials(buffers.probabilities, ld, rows, columns, scale, buffers.maximum, ignored, ignored,
                               probabilities);
      for (int64_t kind = 0; kind < kinds; ++kind) {
        loops.column_dots(probabilities + kind * width, dprobabilities, ld, rows, width, sums + kind * width);
        A* delta = buffers.delta + kind * p.padded + block.q0;
        // The weights include 1 / |Q|, which belongs to P' but not to P.
        for (int64_t c = 0; c < block.exact; ++c)
          delta[c] += sums[kind * width + c] * buffers.weight[kind * width + c] * static_cast<A>(p.kinds());
      }
    }
  }

  // Handles one tile: a block of queries with `rows` keys from n0 on.
  void tile(const QueryBlock& block, int64_t n0, int64_t rows, const HeadBuffers<T>& buffers, A* dkeys,
            A* dvalues) const {
    const int64_t width = block.width, columns = block.columns, ld = block.ld, ld_width = block.ld_width;
    const int64_t kept = p.merged ? n0 * ld : 0;
    A *scores = buffers.scores + kept, *dprobabilities = buffers.dprobabilities + kept, *total = buffers.total;
    F *dscores = buffers.dscores + kept, *dscores_rows = buffers.dscores_rows + kept;
    if (!p.merged) products(block, n0, rows, buffers, scores, dprobabilities);
    for (int64_t kind = 0; kind < kinds; ++kind)
      score_loops.score_gradients(scores + kind * width, ld, dprobabilities, total, ld_width, rows, width, scale,
                                  buffers.maximum + kind * width, buffers.weight + kind * width,
                                  buffers.delta + kind * p.padded + block.q0, kind == 0);
    if (dvalues) {
      if (sizeof(F) == 2) factors.store(total, ld_width, nullptr, rows, width, width, buffers.total_rows, ld_width);
      matrix_product<F>(rows, d, width, buffers.total_rows, ld_width, buffers.doutput_rows, spread(d), dvalues + n0 * d,
                        d, !block.first);
    }
    if (!need_scores) return;
    if (sizeof(F) == 2) {
      factors.store(scores, ld, nullptr, rows, columns, columns, dscores_rows, ld);
      factors.pack_stored(dscores_rows, ld, rows, columns, dscores, ld);
    }
    if (dkeys)
      matrix_product<F>(rows, d, columns, dscores_rows, ld, buffers.query_rows, spread(d), dkeys + n0 * d, d,
                        !block.first);
    if (need_queries)
      matrix_product<F>(d, columns, even<F>(rows), buffers.keys + n0, p.padded, dscores, ld, buffers.dqueries, ld,
                        n0 > 0);
  }

  void store_queries(int64_t b, int64_t h, const QueryBlock& block, const HeadBuffers<T>& buffers) const {
    const int64_t at = offset(b, h) + block.q0, ld = block.ld;
    const int64_t padding = block.q0 + block.exact == p.classes ? p.padded - block.q0 : block.exact;
    if (out.dtext_query)
      for (int64_t r = 0; r < d; ++r) {
        const A* from = buffers.dqueries + r * ld;
        A* to = out.dtext_query + at + r * p.padded;
        std::copy(from, from + block.exact, to);
        std::fill(to + block.exact, to + padding, A(0));
      }
    if (out.drational_query)
      factors.store(buffers.dqueries + (kinds - 1) * block.width, ld, nullptr, d, block.exact, padding,
                    out.drational_query + at, p.padded);
  }

  void single_row(int64_t b, int64_t h, A* dkeys, A* dvalues, Scratch& scratch) const {
    const int64_t at = offset(b, h), row = b * p.width + h * d;
    const A share = A(1) / static_cast<A>(p.kinds());
    A *probability = scratch.take<A>(p.padded), *dscore = scratch.take<A>(p.padded), *doutput = scratch.take<A>(d);
    std::fill(doutput, doutput + d, A(0));
    loops.row_sums(out.doutput + at, p.padded, d, p.classes, doutput);
    double* exact = scratch.take<double>(p.padded);
    std::fill(exact, exact + p.classes, 0.0);
    loops.add_scaled_rows(state.keys + at, p.padded, state.image_query + row, d, p.classes, exact);
    for (int64_t k = 0; k < p.classes; ++k) probability[k] = static_cast<A>(exact[k]);
    score_loops.softmax(probability, p.classes, scale);
    for (int64_t k = 0; k < p.classes; ++k) probability[k] *= share;
    if (dvalues) loops.add_outer(probability, doutput, p.classes, d, dvalues, d);
    if (!need_scores) return;
    std::fill(exact, exact + p.classes, 0.0);
    loops.add_scaled_rows(state.values + at, p.padded, doutput, d, p.classes, exact);
    // delta is computed from the same probabilities, so that the gradients of a row add up to zero.
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
};

}  // namespace

template <typename T>
void class_attention_backward(const Problem& p, int64_t images, const AttentionState<T>& state,
                              const AttentionGradients<T>& out) {
  using A = Acc<T>;
  const Backward<T> backward(p, state, out);
  const int64_t d = p.head_width, heads = images * p.heads, size = p.classes * d, blocks = p.query_blocks;
  const int64_t parts = p.per_class_kinds() ? splits(p, images, 2) : 1;
  const int64_t work = heads * p.classes * (8 * p.per_class_kinds() * p.classes + 16) * d;
  std::unique_ptr<A[]> shared(parts > 1 ? new A[static_cast<size_t>(2 * heads * parts * size)] : nullptr);

  share_tasks(p.threads, heads * parts, work, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(task);) {
      Scratch& scratch = Scratch::rewound();
      const int64_t head = task / parts, part = task % parts, b = head / p.heads, h = head % p.heads;
      A* sums = shared ? shared.get() + 2 * task * size : scratch.take<A>(2 * size);
      A *dkeys = out.dkeys ? sums : nullptr, *dvalues = out.dvalues ? sums + size : nullptr;
      if (p.per_class_kinds())
        backward.per_class_queries(b, h, part * blocks / parts, (part + 1) * blocks / parts, dkeys, dvalues, scratch);
      else
        std::fill(sums, sums + 2 * size, A(0));
      if (part == 0) backward.image_query(b, h, dkeys, dvalues, scratch);
      if (!shared) backward.finish(b, h, 0, d, sums, 1, scratch);
    }
  });
  if (!shared) return;

  const int64_t slices = divide_up(d, kFeatureBlock);
  share_tasks(p.threads, heads * slices, heads * parts * size, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(task);) {
      const int64_t head = task / slices, c0 = task % slices * kFeatureBlock;
      backward.finish(head / p.heads, head % p.heads, c0, std::min(kFeatureBlock, d - c0),
                      shared.get() + 2 * head * parts * size, parts, Scratch::rewound());
    }
  });
}

#define RADA_INSTANTIATE(T)                                                                      \
  template void class_attention_backward<T>(const Problem&, int64_t, const AttentionState<T>&,   \
                                            const AttentionGradients<T>&);
RADA_STORED_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE

}  // namespace rada_fast
