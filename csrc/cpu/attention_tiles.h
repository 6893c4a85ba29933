// Helpers of the attention's forward and backward pass for their tiles.
#pragma once

#include <type_traits>

#include "class_attention.h"
#include "class_tiles.h"
#include "score_loops.h"

namespace rada_fast {

// The keys or values of a head, (rows, ld), as a left factor: the stored array itself, or a widened copy in `memory`.
template <typename T>
const Factor<T>* left_factor(const T* stored, int64_t ld, int64_t rows, Factor<T>* memory) {
  if constexpr (std::is_same_v<T, Factor<T>>) {
    return stored;
  } else {
    chosen_loops<AdapterLoops<T>>().pack_stored(stored, ld, rows, ld, memory, ld);
    return memory;
  }
}

// The number of elements that left_factor needs in `memory`.
template <typename T>
constexpr int64_t left_factor_size(int64_t elements) {
  return std::is_same_v<T, Factor<T>> ? 0 : elements;
}

// The number of tasks that share one head of one image, so that each thread has `tasks` of them or more.
inline int64_t splits(const Problem& p, int64_t images, int64_t tasks) {
  return std::clamp<int64_t>(divide_up(tasks * p.threads, std::max<int64_t>(images * p.heads, 1)), 1, p.query_blocks);
}

// The queries of one block, kind after kind, as an operand: (d, kinds * columns).
template <typename T>
void pack_queries(const Problem& p, const AttentionState<T>& state, int64_t b, int64_t h, int64_t q0, int64_t columns,
                  Factor<T>* operand, int64_t ld) {
  const int64_t row = h * p.head_width * p.padded + q0;
  int64_t at = 0;
  for (const T* query : {state.text_query, state.rational_query ? state.rational_query + b * p.image_size() : nullptr})
    if (query) {
      // In an operand of interleaved pairs each column has two elements.
      chosen_loops<AdapterLoops<T>>().pack_stored(query + row, p.padded, p.head_width, columns, operand + at * even<Factor<T>>(1), ld);
      at += columns;
    }
}

// Computes the attention of the image query of a head of all images, which has a single row of scores.
// scores, exact: memory for a value of each class.
template <typename T>
void image_query_attention(const Problem& p, const AttentionState<T>& state, int64_t head, Acc<T>* scores, double* exact) {
  using A = Acc<T>;
  const auto& loops = chosen_loops<AdapterLoops<T>>();
  const int64_t d = p.head_width, row = head * d, at = head / p.heads * p.image_size() + head % p.heads * d * p.padded;
  std::fill(exact, exact + p.classes, 0.0);
  loops.add_scaled_rows(state.keys + at, p.padded, state.image_query + row, d, p.classes, exact);
  for (int64_t k = 0; k < p.classes; ++k) scores[k] = static_cast<A>(exact[k]);
  chosen_loops<ScoreLoops<T>>().softmax(scores, p.classes, static_cast<A>(p.score_scale));
  const A share = A(1) / static_cast<A>(p.kinds());
  for (int64_t k = 0; k < p.classes; ++k) scores[k] *= share;
  std::fill(state.image_attended + row, state.image_attended + row + d, A(0));
  loops.row_dots(state.values + at, p.padded, scores, d, p.classes, state.image_attended + row);
}

}  // namespace rada_fast
