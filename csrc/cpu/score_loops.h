// The loops over the attention's scores: maxima, exponentials and gradients. See instruction_set.h.
//
// S are the scores and P the probabilities, with keys in rows and queries in columns. adapter_loops.h says what `ld` and an
// operand are.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "number_types.h"

namespace rada_fast {

template <typename T>
struct ScoreLoops {
  using A = Acc<T>;
  using F = Factor<T>;

  // Maxima are taken of the scores S before they are scaled. S - maximum is then exactly 0 for the largest score, and the
  // rounding error of a scaled score, which may be of any size, never enters an exponent.
  //
  // running_max[c] = max(running_max[c], max_r scores[r][c])
  void (*column_maximum)(const A* scores, int64_t ld, int64_t rows, int64_t columns, A* running_max);
  // operand = P = exp(scale * (S - maximum[c])); float and double overwrite the scores. Adds the columns' sums of P to sum,
  // and those of P after it was rounded to 16 bits to stored_sum. A product with the operand is normalised by stored_sum,
  // because equal probabilities are all rounded the same way. Float and double do not write stored_sum.
  void (*exponentials)(A* scores, int64_t ld, int64_t rows, int64_t columns, A scale, const A* maximum, A* sum,
                       A* stored_sum, F* operand);
  // For one query kind, computes P = weight[c] * exp(scale * (S - maximum[c])) and dS = scale * P * (dP - delta[c]), which
  // overwrites the scores. total = P if this kind is the first, else total += P.
  void (*score_gradients)(A* scores, int64_t ld, const A* dprobabilities, A* total, int64_t ldp, int64_t rows,
                          int64_t columns, A scale, const A* maximum, const A* weight, const A* delta, bool first);
  // out = first_factor * first + second_factor * second
  void (*weighted_sum)(const A* first, const A* second, int64_t ld, A first_factor, A second_factor, int64_t rows,
                       int64_t columns, A* out, int64_t ldo);
  void (*softmax)(A* scores, int64_t count, A scale);  // in place
  // out[i] = exp(scale * (before[i] - after[i])), the factor of a sum whose running maximum grows from before to after.
  void (*rescales)(const A* before, const A* after, A scale, int64_t count, A* out);
};

#define RADA_SCORE_LOOPS(T) RADA_LOOPS(ScoreLoops<T>)
RADA_STORED_TYPES(RADA_SCORE_LOOPS)
#undef RADA_SCORE_LOOPS

}  // namespace rada_fast
