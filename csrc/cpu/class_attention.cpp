#include "class_attention.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "attention_tiles.h"
#include "matrix_product.h"
#include "tasks.h"

namespace rada_fast {
namespace {

// The matrix softmax's statistics of one block of queries: the maximum of its scores, and the sum of exp(scale (S - max)).
template <typename A>
struct BlockStatistics {
  A maximum, sum;
};

// The running softmax of one block's queries over the keys. Arrays have a value for each query: kind after kind, with
// `width` queries each.
template <typename A>
struct RunningSoftmax {
  A *running_max, *next_max, *running_sum;
  A* stored_sum;  // sum of the probabilities after they were rounded to 16 bits; for float and double it is running_sum
  A* output;      // O^T, summed over the keys so far, (d, columns) with the leading dimension spread(columns)

  void start(int64_t columns) const {
    std::fill(running_max, running_max + columns, -std::numeric_limits<A>::infinity());
    std::fill(running_sum, running_sum + columns, A(0));
    std::fill(stored_sum, stored_sum + columns, A(0));
  }
};

// The most tasks into which one of the last groups of blocks of queries is divided.
constexpr int64_t kPieces = 4;

template <typename T>
class Forward {
 public:
  using A = Acc<T>;
  using F = Factor<T>;

  Forward(const Problem& problem, int64_t images, const AttentionState<T>& attention)
      : p(problem), state(attention), heads(images * p.heads), parts(splits(p, images, 4)),
        pieces(std::min<int64_t>(kPieces, divide_up(p.query_blocks, parts))), grouped(heads * parts, pieces, p.threads) {
    statistics.reset(new BlockStatistics<A>[static_cast<size_t>(2 * heads * p.query_blocks)]);
  }

  void run() const {
    const int64_t work = heads * p.classes * (4 * kinds * p.classes + 4) * d;
    share_tasks(p.threads, grouped.count, work, [&](TaskQueue& queue) { tasks(queue); });
    for (int64_t kind = 0; kind < kinds; ++kind)
      for (int64_t head = 0; head < heads; ++head) combine_blocks(kind, head);
  }

 private:
  const Problem& p;
  const AttentionState<T>& state;
  const AdapterLoops<T>& loops = chosen_loops<AdapterLoops<T>>();
  const ScoreLoops<T>& score_loops = chosen_loops<ScoreLoops<T>>();
  const int64_t heads, parts;  // the number of heads of all images, and of the groups of tasks that share one head
  const int64_t pieces;        // the number of the smallest tasks of such a group
  const GroupedTasks grouped;
  const int64_t d = p.head_width, kinds = p.per_class_kinds();
  // share is 1 / |Q|, one over the number of query kinds: the results of the kinds are averaged.
  const A scale = static_cast<A>(p.score_scale), share = A(1) / static_cast<A>(p.kinds());
  std::unique_ptr<BlockStatistics<A>[]> statistics;  // (kind, head, block)

  BlockStatistics<A>& statistic(int64_t kind, int64_t head, int64_t block) const {
    return statistics[static_cast<size_t>((kind * heads + head) * p.query_blocks + block)];
  }
  int64_t offset(int64_t head) const { return head / p.heads * p.image_size() + head % p.heads * d * p.padded; }

  // Works on tasks until none is left. A task is some blocks of queries of one head, perhaps none.
  void tasks(TaskQueue& queue) const {
    Scratch& scratch = Scratch::rewound();
    const int64_t most = spread(kinds * kQueryBlock);
    F *key_rows = scratch.take<F>(p.padded * d), *widened = scratch.take<F>(left_factor_size<T>(p.padded * d));
    F* queries = scratch.take<F>(even<F>(d) * most);
    A* scores = scratch.take<A>(std::max((p.merged ? p.padded : kKeyBlock) * most, p.padded));
    F* probabilities = sizeof(F) == 2 ? scratch.take<F>(kKeyBlock * most) : reinterpret_cast<F*>(scores);
    RunningSoftmax<A> softmax{};
    softmax.output = scratch.take<A>(d * most);
    softmax.running_max = scratch.take<A>(most);
    softmax.next_max = scratch.take<A>(most);
    softmax.running_sum = scratch.take<A>(most);
    softmax.stored_sum = sizeof(F) == 2 ? scratch.take<A>(most) : softmax.running_sum;
    double* exact = scratch.take<double>(p.image ? p.padded : 0);
    const F* values = nullptr;
    int64_t transposed = -1;  // the head whose keys are in key_rows
    for (int64_t task; queue.take(task);) {
      const int64_t of_head = parts * pieces, head = grouped.first(task) / of_head, blocks = p.query_blocks;
      const int64_t first = grouped.first(task) - head * of_head, last = grouped.last(task) - head * of_head;
      const int64_t begin = first * blocks / of_head, end = last * blocks / of_head;
      if (p.image && first == 0) image_query_attention(p, state, head, scores, exact);
      if (kinds == 0 || begin == end) continue;
      if (transposed != head) {
        loops.transpose(state.keys + offset(head), p.padded, d, p.classes, key_rows, d);
        values = left_factor(state.values + offset(head), p.padded, d, widened);
        transposed = head;
      }
      for (int64_t block = begin; block < end; ++block) {
        const int64_t q0 = block * kQueryBlock, width = std::min(kQueryBlock, p.classes - q0);
        pack_queries(p, state, head / p.heads, head % p.heads, q0, width, queries, spread(kinds * width));
        if (p.merged) {
          attend_merged(key_rows, values, queries, width, scores, softmax);
          finish_merged(head, block, width, softmax);
        } else {
          attend(key_rows, values, queries, width, scores, probabilities, softmax);
          finish_block(head, block, width, softmax);
        }
      }
    }
  }

  // Runs the online softmax of one block's queries (`width` per kind) over all keys.
  void attend(const F* key_rows, const F* values, const F* queries, int64_t width, A* scores, F* probabilities,
              RunningSoftmax<A>& softmax) const {
    const int64_t columns = kinds * width, ld = spread(columns);
    softmax.start(columns);
    for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock) {
      const int64_t rows = std::min(kKeyBlock, p.classes - n0);
      matrix_product<F>(rows, columns, d, key_rows + n0 * d, d, queries, ld, scores, ld, false);
      A* next = softmax.next_max;
      std::copy(softmax.running_max, softmax.running_max + columns, next);
      score_loops.column_maximum(scores, ld, rows, columns, next);
      if (p.matrix_softmax)  // all queries of a kind share one maximum
        for (int64_t c = 0; c < columns; c += width)
          std::fill(next + c, next + c + width, *std::max_element(next + c, next + c + width));
      if (n0 > 0 && !std::equal(next, next + columns, softmax.running_max)) rescale(columns, softmax);
      std::swap(softmax.running_max, softmax.next_max);
      score_loops.exponentials(scores, ld, rows, columns, scale, softmax.running_max, softmax.running_sum,
                               softmax.stored_sum, probabilities);
      matrix_product<F>(d, columns, even<F>(rows), values + n0, p.padded, probabilities, ld, softmax.output, ld,
                        n0 > 0);
    }
  }

  // Computes the scores of one block's queries with all keys, and the result of both kinds together.
  void attend_merged(const F* key_rows, const F* values, const F* queries, int64_t width, A* scores,
                     const RunningSoftmax<A>& softmax) const {
    const int64_t columns = kinds * width, ld = spread(columns);
    A* factors = softmax.next_max;
    softmax.start(columns);
    for_key_blocks([&](int64_t n0, int64_t rows) {
      A* tile = scores + n0 * ld;
      matrix_product<F>(rows, columns, d, key_rows + n0 * d, d, queries, ld, tile, ld, false);
      score_loops.column_maximum(tile, ld, rows, columns, softmax.running_max);
    });
    for_key_blocks([&](int64_t n0, int64_t rows) {
      A* tile = scores + n0 * ld;
      score_loops.exponentials(tile, ld, rows, columns, scale, softmax.running_max, softmax.running_sum,
                               softmax.stored_sum, reinterpret_cast<F*>(tile));
    });
    for (int64_t c = 0; c < columns; ++c) factors[c] = share / softmax.running_sum[c];
    for_key_blocks([&](int64_t n0, int64_t rows) {
      A* tile = scores + n0 * ld;
      loops.scale_columns(tile, ld, rows, columns, factors);
      loops.combine(tile + width, ld, A(1), nullptr, rows, width, tile, ld, false);
      matrix_product<F>(d, width, rows, values + n0, p.padded, reinterpret_cast<F*>(tile), ld, softmax.output,
                        spread(columns), n0 > 0);
    });
  }

  // Calls body(first key, number of keys) for every block of keys.
  template <typename Body>
  void for_key_blocks(const Body& body) const {
    for (int64_t n0 = 0; n0 < p.classes; n0 += kKeyBlock) body(n0, std::min(kKeyBlock, p.classes - n0));
  }

  // Multiplies the sums so far by exp(scale (running_max - next_max)), and leaves these factors in running_max.
  void rescale(int64_t columns, const RunningSoftmax<A>& softmax) const {
    A* factors = softmax.running_max;
    score_loops.rescales(softmax.running_max, softmax.next_max, scale, columns, factors);
    loops.scale_columns(softmax.output, spread(columns), d, columns, factors);
    loops.scale_columns(softmax.running_sum, columns, 1, columns, factors);
    if (sizeof(F) == 2) loops.scale_columns(softmax.stored_sum, columns, 1, columns, factors);
  }

  // Divides a block's output by its sums, and stores the output, the maxima and the sums.
  void finish_block(int64_t head, int64_t block, int64_t width, const RunningSoftmax<A>& softmax) const {
    const int64_t q0 = block * kQueryBlock, ld = spread(kinds * width);
    const int64_t padding = q0 + width == p.classes ? p.padded - q0 : width;
    for (int64_t kind = 0; kind < kinds; ++kind) {
      A *maximum = softmax.running_max + kind * width, *sum = softmax.running_sum + kind * width;
      A *stored = softmax.stored_sum + kind * width, *output = softmax.output + kind * width;
      if (p.matrix_softmax) {
        statistic(kind, head, block) = {maximum[0], static_cast<A>(std::accumulate(sum, sum + width, 0.0))};
        std::fill(stored, stored + width, static_cast<A>(std::accumulate(stored, stored + width, 0.0)));
      } else {
        store_rows(kind, head, q0, width, softmax);
      }
      for (int64_t c = 0; c < width; ++c) stored[c] = A(1) / stored[c];
      loops.scale_columns(output, ld, d, width, stored);
      loops.store_exact(output, ld, nullptr, d, width, padding, state.attended[kind] + offset(head) + q0, p.padded);
    }
  }

  // Stores the merged output of a block, and each kind's maxima and sums.
  void finish_merged(int64_t head, int64_t block, int64_t width, const RunningSoftmax<A>& softmax) const {
    const int64_t q0 = block * kQueryBlock, padding = q0 + width == p.classes ? p.padded - q0 : width;
    for (int64_t kind = 0; kind < kinds; ++kind) store_rows(kind, head, q0, width, softmax);
    loops.store_exact(softmax.output, spread(kinds * width), nullptr, d, width, padding,
                      state.attended[0] + offset(head) + q0, p.padded);
  }

  // Stores the statistics of the row softmax of a block's queries of one kind.
  void store_rows(int64_t kind, int64_t head, int64_t q0, int64_t width, const RunningSoftmax<A>& softmax) const {
    const A *maximum = softmax.running_max + kind * width, *sum = softmax.running_sum + kind * width;
    std::copy(maximum, maximum + width, state.maxima[kind] + head * p.padded + q0);
    for (int64_t c = 0; c < width; ++c) state.weights[kind][head * p.padded + q0 + c] = share / sum[c];
  }

  // Computes the factor of every block's output. With the matrix softmax all blocks of a head share one maximum and sum.
  void combine_blocks(int64_t kind, int64_t head) const {
    A* factors = state.factors[kind] + head * p.query_blocks;
    if (!p.matrix_softmax) {
      std::fill(factors, factors + p.query_blocks, p.merged ? A(1) : share);
      return;
    }
    A maximum = -std::numeric_limits<A>::infinity(), total = 0;
    for (int64_t block = 0; block < p.query_blocks; ++block)
      maximum = std::max(maximum, statistic(kind, head, block).maximum);
    for (int64_t block = 0; block < p.query_blocks; ++block) {
      const BlockStatistics<A>& own = statistic(kind, head, block);
      factors[block] = own.sum * std::exp(scale * (own.maximum - maximum));
      total += factors[block];
    }
    const A weight = share * static_cast<A>(p.classes) / total;
    for (int64_t block = 0; block < p.query_blocks; ++block) factors[block] *= weight;
    state.maxima[kind][head] = maximum;
    state.weights[kind][head] = weight;
  }
};

}  // namespace

template <typename T>
void class_attention_forward(const Problem& p, int64_t images, const AttentionState<T>& state) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (p.merged && p.matrix_softmax) {
      merged_matrix_attention<T>(p, images, state);
      return;
    }
  }
  Forward<T>(p, images, state).run();
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
      if (p.per_class_kinds() == 0) loops.combine(nullptr, 0, 0, constant, d, width, to, ldo, true);
      for (int64_t kind = 0; kind < p.attended_kinds(); ++kind)
        loops.combine(state.attended[kind] + b * p.image_size() + h * d * p.padded + k0, p.padded,
                     state.factors[kind][(b * p.heads + h) * p.query_blocks + k0 / kQueryBlock],
                     kind == 0 ? constant : nullptr, d, width, to, ldo, kind == 0);
    }
}

#define RADA_INSTANTIATE(T) \
  template void class_attention_forward<T>(const Problem&, int64_t, const AttentionState<T>&);
RADA_STORED_TYPES(RADA_INSTANTIATE)
#undef RADA_INSTANTIATE
template void combine_attended<float>(const Problem&, int64_t, int64_t, int64_t, const Attended<float>&, float*,
                                      int64_t);
template void combine_attended<double>(const Problem&, int64_t, int64_t, int64_t, const Attended<double>&, double*,
                                       int64_t);

}  // namespace rada_fast
