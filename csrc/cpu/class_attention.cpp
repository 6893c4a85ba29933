#include "class_attention.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "attention_tiles.h"
#include "matrix_product.h"

namespace rada_fast {
namespace {

template <typename T>
void image_forward(const Problem& p, const AttentionState<T>& state, int64_t b, int64_t h, Acc<T>* scores,
                   double* exact) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t d = p.head_width, at = b * p.image_size() + h * d * p.padded, row = b * p.width + h * d;
  std::fill(exact, exact + p.classes, 0.0);
  loops.add_scaled_rows(state.keys + at, p.padded, state.image_query + row, d, p.classes, exact);
  for (int64_t k = 0; k < p.classes; ++k) scores[k] = static_cast<A>(exact[k]);
  loops.softmax(scores, p.classes, static_cast<A>(p.score_scale));
  const A share = A(1) / static_cast<A>(p.kinds());
  for (int64_t k = 0; k < p.classes; ++k) scores[k] *= share;
  std::fill(state.image_attended + row, state.image_attended + row + d, A(0));
  loops.row_dots(state.values + at, p.padded, scores, d, p.classes, state.image_attended + row);
}

}  // namespace

template <typename T>
void class_attention_forward(const Problem& p, int64_t images, const AttentionState<T>& state) {
  using A = Acc<T>;
  using F = Factor<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t d = p.head_width, parts = splits(p, images), wide = p.wide_kinds();
  const int64_t heads = images * p.heads, blocks = p.query_blocks;
  const A share = A(1) / static_cast<A>(p.kinds());
  // (kind, head, block): maximum and sum of each block under the matrix softmax.
  std::unique_ptr<A[]> statistics(new A[static_cast<size_t>(2 * 2 * heads * blocks)]);
  const auto statistic = [&](int64_t kind, int64_t head, int64_t block) {
    return statistics.get() + 2 * ((kind * heads + head) * blocks + block);
  };

  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    const int64_t most = wide * kQueryBlock;
    F *key_rows = scratch.take<F>(p.padded * d), *widened = scratch.take<F>(left_factor_size<T>(p.padded * d));
    F* queries = scratch.take<F>(even<F>(d) * most);
    A* scores = scratch.take<A>(std::max(kKeyBlock * most, p.padded));
    F* probabilities = sizeof(F) == 2 ? scratch.take<F>(kKeyBlock * most) : reinterpret_cast<F*>(scores);
    A* output = scratch.take<A>(d * most);
    A *maximum = scratch.take<A>(most), *next = scratch.take<A>(most), *sum = scratch.take<A>(most);
    A* stored_sum = sizeof(F) == 2 ? scratch.take<A>(most) : sum;
    double* exact = scratch.take<double>(p.image ? p.padded : 0);
    const F* values = nullptr;
    int64_t transposed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts, b = head / p.heads, h = head % p.heads;
      const T* keys = state.keys + b * p.image_size() + h * d * p.padded;
      if (p.image && part == 0) image_forward(p, state, b, h, scores, exact);
      if (wide == 0) continue;
      if (transposed != head) {
        loops.transpose(keys, p.padded, d, p.classes, key_rows, d);
        values = left_factor(state.values + b * p.image_size() + h * d * p.padded, p.padded, d, widened);
        transposed = head;
      }
      for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const int64_t q0 = block * kQueryBlock, width = std::min(kQueryBlock, p.classes - q0), columns = wide * width;
        pack_queries(p, state, b, h, q0, width, queries, columns);
        std::fill(maximum, maximum + columns, -std::numeric_limits<A>::infinity());
        std::fill(sum, sum + columns, A(0));
        std::fill(stored_sum, stored_sum + columns, A(0));
        for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock) {
          const int64_t rows = std::min(kKeyBlock, p.classes - n0);
          matrix_product<F>(rows, columns, d, key_rows + n0 * d, d, queries, columns, scores, columns, false);
          std::copy(maximum, maximum + columns, next);
          loops.column_maximum(scores, columns, rows, columns, static_cast<A>(p.score_scale), next);
          if (p.matrix_softmax)
            for (int64_t c = 0; c < columns; c += width)
              std::fill(next + c, next + c + width, *std::max_element(next + c, next + c + width));
          if (n0 > 0 && !std::equal(next, next + columns, maximum)) {
            for (int64_t c = 0; c < columns; ++c) maximum[c] -= next[c];
            loops.exponential(maximum, columns);
            loops.scale_columns(output, columns, d, columns, maximum);
            loops.scale_columns(sum, columns, 1, columns, maximum);
            if (sizeof(F) == 2) loops.scale_columns(stored_sum, columns, 1, columns, maximum);
          }
          std::swap(maximum, next);
          loops.exponentials(scores, columns, rows, columns, static_cast<A>(p.score_scale), maximum, sum, stored_sum,
                            probabilities);
          matrix_product<F>(d, columns, even<F>(rows), values + n0, p.padded, probabilities, columns, output, columns,
                            n0 > 0);
        }
        const int64_t padding = q0 + width == p.classes ? p.padded - q0 : width;
        for (int64_t kind = 0; kind < wide; ++kind) {
          A *m = maximum + kind * width, *l = sum + kind * width, *stored = stored_sum + kind * width;
          if (p.matrix_softmax) {
            const A total = static_cast<A>(std::accumulate(l, l + width, 0.0));
            statistic(kind, head, block)[0] = m[0];
            statistic(kind, head, block)[1] = total;
            std::fill(stored, stored + width, static_cast<A>(std::accumulate(stored, stored + width, 0.0)));
          } else {
            std::copy(m, m + width, state.maxima[kind] + head * p.padded + q0);
            for (int64_t c = 0; c < width; ++c) state.weights[kind][head * p.padded + q0 + c] = share / l[c];
          }
          for (int64_t c = 0; c < width; ++c) stored[c] = A(1) / stored[c];
          loops.scale_columns(output + kind * width, columns, d, width, stored);
          loops.store_exact(output + kind * width, columns, nullptr, d, width, padding,
                           state.attended[kind] + b * p.image_size() + h * d * p.padded + q0, p.padded);
        }
      }
    }
  });

  for (int64_t kind = 0; kind < wide; ++kind)
    for (int64_t head = 0; head < heads; ++head) {
      A* factors = state.factors[kind] + head * blocks;
      if (!p.matrix_softmax) {
        std::fill(factors, factors + blocks, share);
        continue;
      }
      A best = -std::numeric_limits<A>::infinity(), total = 0;
      for (int64_t block = 0; block < blocks; ++block) best = std::max(best, statistic(kind, head, block)[0]);
      for (int64_t block = 0; block < blocks; ++block) {
        const A* of = statistic(kind, head, block);
        factors[block] = of[1] * std::exp(of[0] - best);
        total += factors[block];
      }
      const A weight = share * static_cast<A>(p.classes) / total;
      for (int64_t block = 0; block < blocks; ++block) factors[block] *= weight;
      state.maxima[kind][head] = best;
      state.weights[kind][head] = weight;
    }
}

template <typename A>
void combine_attended(const Problem& p, int64_t b, int64_t first_class, int64_t columns, const Attended<A>& state,
                      A* out, int64_t ldo) {
  const auto& loops = chosen_loops<AdapterLoops<A>>();
  const int64_t d = p.head_width;
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t c = 0, width = 0; c < columns; c += width) {
      const int64_t k0 = first_class + c;
      width = std::min(kQueryBlock - k0 % kQueryBlock, columns - c);
      const A* constant = p.image ? state.image_attended + b * p.width + h * d : nullptr;
      A* to = out + h * d * ldo + c;
      if (p.wide_kinds() == 0) loops.combine(nullptr, 0, 0, constant, d, width, to, ldo, true);
      for (int64_t kind = 0; kind < p.wide_kinds(); ++kind)
        loops.combine(state.attended[kind] + b * p.image_size() + h * d * p.padded + k0, p.padded,
                     state.factors[kind][(b * p.heads + h) * p.query_blocks + k0 / kQueryBlock],
                     kind == 0 ? constant : nullptr, d, width, to, ldo, kind == 0);
    }
}

template void class_attention_forward<float>(const Problem&, int64_t, const AttentionState<float>&);
template void class_attention_forward<double>(const Problem&, int64_t, const AttentionState<double>&);
template void class_attention_forward<BF16>(const Problem&, int64_t, const AttentionState<BF16>&);
template void class_attention_forward<WideBF16>(const Problem&, int64_t, const AttentionState<WideBF16>&);
template void combine_attended<float>(const Problem&, int64_t, int64_t, int64_t, const Attended<float>&, float*,
                                      int64_t);
template void combine_attended<double>(const Problem&, int64_t, int64_t, int64_t, const Attended<double>&, double*,
                                       int64_t);

}  // namespace rada_fast
