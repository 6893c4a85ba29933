// What the attention's forward and backward share about their tiles.
#pragma once

#include <type_traits>

#include "class_attention.h"

namespace rada_fast {

// Inner dimensions of a bfloat16 product are even; what is added is zero on one side and finite on the other.
template <typename T>
constexpr int64_t even(int64_t n) {
  return sizeof(T) == 2 ? round_up(n, 2) : n;
}

// Keys or values of a head, (rows, ld), as a left factor: where they are, or widened into `memory`.
template <typename T>
const Factor<T>* left_factor(const T* stored, int64_t ld, int64_t rows, Factor<T>* memory) {
  if constexpr (std::is_same_v<T, Factor<T>>) {
    return stored;
  } else {
    chosen_loops<AdapterLoops<T>>().pack_stored(stored, ld, rows, ld, memory, ld);
    return memory;
  }
}

// Elements that left_factor wants of its memory.
template <typename T>
constexpr int64_t left_factor_size(int64_t elements) {
  return std::is_same_v<T, Factor<T>> ? 0 : elements;
}

// How many threads share one head of one image.
inline int64_t splits(const Problem& p, int64_t images) {
  return std::clamp<int64_t>(divide_up(2 * p.threads, images * p.heads), 1, p.query_blocks);
}

// The wide queries of one block side by side as an operand: (d, kinds * columns).
template <typename T>
void pack_queries(const Problem& p, const AttentionState<T>& state, int64_t b, int64_t h, int64_t q0, int64_t columns,
                  Factor<T>* operand, int64_t ld) {
  const int64_t row = h * p.head_width * p.padded + q0;
  int64_t at = 0;
  for (const T* query : {state.text_query, state.rational_query ? state.rational_query + b * p.image_size() : nullptr})
    if (query) {
      // In an operand of pairs the columns of a pair lie side by side.
      chosen_loops<AdapterLoops<T>>().pack_stored(query + row, p.padded, p.head_width, columns, operand + at * even<Factor<T>>(1), ld);
      at += columns;
    }
}

}  // namespace rada_fast
