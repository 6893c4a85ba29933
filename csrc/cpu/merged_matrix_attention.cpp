// The forward pass of the "matrix" softmax with merged query kinds: one product with the values serves both, where no
// backward pass follows. The weight of a kind is known only when all scores of the head are, so that the exponentials of a
// whole head are kept until then: each thread keeps those of the blocks of queries that it computed itself, so that they
// stay in the caches near it. See class_attention.h.
#include <atomic>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <vector>

#include "attention_tiles.h"
#include "matrix_product.h"
#include "score_loops.h"
#include "tasks.h"

namespace rada_fast {
namespace {

constexpr int64_t kMergedKinds = 2;

// A tile's exponentials are exp(scale (S - maximum)), and add up to `sum`.
template <typename A>
struct TileStatistics {
  A maximum, sum;
};

// The factors of the exponentials of a head, for each kind: weight exp(scale (maximum of the tile - maximum)).
template <typename A>
struct HeadWeights {
  int64_t head = -1;
  A maximum[kMergedKinds], weight[kMergedKinds];
};

// The exponentials of a block of queries with all keys: (classes, both kinds' queries).
template <typename A>
struct KeptBlock {
  int64_t number;  // of the head and the block
  A* exponentials;
};

template <typename T>
class MergedForward {
 public:
  using A = Acc<T>;

  MergedForward(const Problem& problem, int64_t images, const AttentionState<T>& attention)
      : p(problem), state(attention), heads(images * p.heads),
        statistics(static_cast<size_t>(heads * kMergedKinds * tiles)),
        finished(new std::atomic<int>[static_cast<size_t>(heads)]()) {}

  void run() {
    const int64_t work = heads * p.classes * (3 * kMergedKinds * p.classes + 4) * d;
    share_tasks(p.threads, heads * blocks, work, [&](TaskQueue& queue) {
      try {
        Worker(*this).run(queue);
      } catch (...) {
        for (int64_t head = 0; head < heads; ++head) finish(head, static_cast<int>(blocks));  // nobody must wait
        throw;
      }
    });
    std::fill(state.factors[0], state.factors[0] + heads * blocks, A(1));
  }

 private:
  const Problem& p;
  const AttentionState<T>& state;
  const int64_t heads, d = p.head_width, blocks = p.query_blocks, key_blocks = divide_up(p.classes, kKeyBlock);
  const int64_t tiles = blocks * key_blocks;  // of a head and a kind
  const A scale = static_cast<A>(p.score_scale);
  std::vector<TileStatistics<A>> statistics;     // (head, kind, block of queries, block of keys)
  std::unique_ptr<std::atomic<int>[]> finished;  // for each head, the number of blocks whose statistics are there

  TileStatistics<A>* statistics_of(int64_t head, int64_t kind) {
    return statistics.data() + (head * kMergedKinds + kind) * tiles;
  }
  // Says that the statistics of so many more blocks of a head are there.
  void finish(int64_t head, int more) {
    std::atomic<int>& number = finished[static_cast<size_t>(head)];
    if (number.fetch_add(more, std::memory_order_acq_rel) + more >= blocks) number.notify_all();
  }
  int64_t offset(int64_t head) const { return head / p.heads * p.image_size() + head % p.heads * d * p.padded; }

  // The work of one thread.
  class Worker {
   public:
    explicit Worker(MergedForward& all) : shared(all), p(all.p) {}

    // Computes exponentials of blocks until none is left. The values are multiplied as soon as the weights are known.
    void run(TaskQueue& queue) {
      for (int64_t number; queue.take(number);) {
        while (!kept.empty() && blocks_there() >= shared.blocks) multiply_values();
        if (p.image && number % shared.blocks == 0)
          image_query_attention(p, shared.state, number / shared.blocks, scores_of_image, exact);
        kept.push_back({number, unused_memory()});
        compute_exponentials(kept.back());
        shared.finish(number / shared.blocks, 1);
      }
      while (!kept.empty()) {
        // A thread that waits sleeps: another program may need the core that this one takes.
        for (int number; (number = blocks_there()) < shared.blocks;) finished_of_first().wait(number);
        multiply_values();
      }
    }

   private:
    MergedForward& shared;
    const Problem& p;
    const AdapterLoops<T>& loops = chosen_loops<AdapterLoops<T>>();
    const ScoreLoops<T>& score_loops = chosen_loops<ScoreLoops<T>>();
    Scratch& scratch = Scratch::rewound();
    const int64_t d = p.head_width, most = spread(kMergedKinds * std::min(kQueryBlock, p.classes));
    T *key_rows = scratch.take<T>(p.classes * d), *queries = scratch.take<T>(d * most);
    A *maximum = scratch.take<A>(most), *sum = scratch.take<A>(most);
    A *probabilities = scratch.take<A>(kKeyBlock * most), *output = scratch.take<A>(d * most);
    A* scores_of_image = scratch.take<A>(p.image ? p.padded : 0);
    double* exact = scratch.take<double>(p.image ? p.padded : 0);
    int64_t transposed = -1;  // the head whose keys are in key_rows
    HeadWeights<A> weights;
    std::deque<KeptBlock<A>> kept;  // in the order of their numbers
    std::vector<A*> unused;         // memory of blocks that are done

    A* unused_memory() {
      if (unused.empty()) return scratch.take<A>(p.classes * most);
      A* const memory = unused.back();  // what was used last lies in the nearest cache
      unused.pop_back();
      return memory;
    }

    // How many blocks of the first kept block's head have statistics.
    const std::atomic<int>& finished_of_first() const {
      return shared.finished[static_cast<size_t>(kept.front().number / shared.blocks)];
    }
    int blocks_there() const { return finished_of_first().load(std::memory_order_acquire); }

    // Calls body(first key, number of keys, statistics' place in a head) for every block of keys.
    template <typename Body>
    void for_key_blocks(int64_t block, const Body& body) const {
      for (int64_t n0 = 0, tile = block * shared.key_blocks; n0 < p.classes; n0 += kKeyBlock, ++tile)
        body(n0, std::min(kKeyBlock, p.classes - n0), tile);
    }

    void compute_exponentials(const KeptBlock<A>& of) {
      const int64_t head = of.number / shared.blocks, block = of.number % shared.blocks, q0 = block * kQueryBlock;
      const int64_t width = std::min(kQueryBlock, p.classes - q0), columns = kMergedKinds * width, ld = spread(columns);
      if (transposed != head) {
        loops.transpose(shared.state.keys + shared.offset(head), p.padded, d, p.classes, key_rows, d);
        transposed = head;
      }
      pack_queries(p, shared.state, head / p.heads, head % p.heads, q0, width, queries, ld);
      for_key_blocks(block, [&](int64_t n0, int64_t rows, int64_t tile) {
        A* scores = of.exponentials + n0 * ld;
        matrix_product<T>(rows, columns, d, key_rows + n0 * d, d, queries, ld, scores, ld, false);
        std::fill(maximum, maximum + columns, -std::numeric_limits<A>::infinity());
        score_loops.column_maximum(scores, ld, rows, columns, maximum);
        for (A* kind = maximum; kind < maximum + columns; kind += width)
          std::fill(kind, kind + width, *std::max_element(kind, kind + width));
        std::fill(sum, sum + columns, A(0));
        score_loops.exponentials(scores, ld, rows, columns, shared.scale, maximum, sum, sum, scores);
        for (int64_t kind = 0; kind < kMergedKinds; ++kind) {
          const A* sums = sum + kind * width;
          shared.statistics_of(head, kind)[tile] = {maximum[kind * width],
                                                    static_cast<A>(std::accumulate(sums, sums + width, 0.0))};
        }
      });
    }

    // Computes the weights of a head whose statistics are there.
    void weigh(int64_t head) {
      weights.head = head;
      for (int64_t kind = 0; kind < kMergedKinds; ++kind) {
        const TileStatistics<A>*begin = shared.statistics_of(head, kind), *end = begin + shared.tiles;
        A largest = -std::numeric_limits<A>::infinity();
        double total = 0;
        for (const auto* tile = begin; tile < end; ++tile) largest = std::max(largest, tile->maximum);
        for (const auto* tile = begin; tile < end; ++tile)
          total += static_cast<double>(tile->sum * std::exp(shared.scale * (tile->maximum - largest)));
        weights.maximum[kind] = largest;
        weights.weight[kind] = static_cast<A>(static_cast<double>(p.classes) / (static_cast<double>(p.kinds()) * total));
      }
    }

    // Computes the result of the first kept block, and lets go of its exponentials.
    void multiply_values() {
      const KeptBlock<A> of = kept.front();
      const int64_t head = of.number / shared.blocks, block = of.number % shared.blocks, q0 = block * kQueryBlock;
      const int64_t width = std::min(kQueryBlock, p.classes - q0), ld = spread(kMergedKinds * width), ldp = spread(width);
      if (weights.head != head) weigh(head);
      for_key_blocks(block, [&](int64_t n0, int64_t rows, int64_t tile) {
        A factors[kMergedKinds];
        for (int64_t kind = 0; kind < kMergedKinds; ++kind) {
          const A above = shared.statistics_of(head, kind)[tile].maximum - weights.maximum[kind];
          factors[kind] = weights.weight[kind] * std::exp(shared.scale * above);
        }
        const A* exponentials = of.exponentials + n0 * ld;
        score_loops.weighted_sum(exponentials, exponentials + width, ld, factors[0], factors[1], rows, width,
                                 probabilities, ldp);
        matrix_product<T>(d, width, rows, shared.state.values + shared.offset(head) + n0, p.padded, probabilities, ldp,
                          output, ldp, n0 > 0);
      });
      const int64_t padding = q0 + width == p.classes ? p.padded - q0 : width;
      loops.store_exact(output, ldp, nullptr, d, width, padding, shared.state.attended[0] + shared.offset(head) + q0,
                        p.padded);
      unused.push_back(of.exponentials);
      kept.pop_front();
    }
  };
};

}  // namespace

template <typename T>
void merged_matrix_attention(const Problem& p, int64_t images, const AttentionState<T>& state) {
  MergedForward<T>(p, images, state).run();
}

template void merged_matrix_attention<float>(const Problem&, int64_t, const AttentionState<float>&);
template void merged_matrix_attention<double>(const Problem&, int64_t, const AttentionState<double>&);

}  // namespace rada_fast
