// The adapter's loops around its matrix products: packing, exponentials, epilogues. See instruction_set.h.
//
// Arrays are row-major; `ld` is the distance between rows in elements. An operand is the right factor of a product:
// plain rows for float and double, and for bfloat16 pairs of rows interleaved, [rows / 2][columns][2], an odd last row
// paired with zeros.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "number_types.h"

namespace rada_fast {

// Penalty L_s on the mask (Eq. 7).
enum class Penalty : int { none, l2, l1, linf };

template <typename A>
struct MaskRows {
  const A* offset;         // A without its bias, [rows][ld]: one row per feature, one column per class
  int64_t ld, rows, columns;
  const A* bias;           // [rows] or null
  const A* image;          // f: [rows]
  const A* text;           // T transposed: [rows][text_ld]
  int64_t text_ld;
  bool relu;
  Penalty penalty;
};

template <typename T>
struct AdapterLoops {
  using A = Acc<T>;
  using F = Factor<T>;

  // operand = source * row_scale[r] * column_scale[c]; either scale may be null.
  void (*pack)(const A* source, int64_t ld, const A* row_scale, const A* column_scale, int64_t rows, int64_t columns,
               F* operand, int64_t ldo);
  void (*pack_stored)(const T* source, int64_t ld, int64_t rows, int64_t columns, F* operand, int64_t ldo);
  // The operand of the transpose of source (rows, columns); bfloat16 wants an even number of columns.
  void (*pack_transposed)(const T* source, int64_t ld, int64_t rows, int64_t columns, F* operand, int64_t ldo);

  void (*transpose)(const T* source, int64_t ld, int64_t rows, int64_t columns, F* out, int64_t ldo);
  void (*transpose_exact)(const A* source, int64_t ld, int64_t rows, int64_t columns, A* out, int64_t ldo);
  // out = source + bias[r], then zeros up to `padded` columns; bias may be null.
  void (*store)(const A* source, int64_t ld, const A* bias, int64_t rows, int64_t columns, int64_t padded, T* out,
                int64_t ldo);
  void (*store_exact)(const A* source, int64_t ld, const A* bias, int64_t rows, int64_t columns, int64_t padded, A* out,
                      int64_t ldo);

  // maximum[c] = max(maximum[c], scale * max_r scores[r][c])
  void (*column_maximum)(const A* scores, int64_t ld, int64_t rows, int64_t columns, A scale, A* maximum);
  // P = exp(scale * scores - shift[c]), left as an operand (float: over the scores). Adds its column sums to sum, and
  // those of P as stored to stored_sum: where all P are alike, so are their roundings, and only the second normalises
  // what the operand gives. (Float and double: not written.)
  void (*exponentials)(A* scores, int64_t ld, int64_t rows, int64_t columns, A scale, const A* shift, A* sum,
                       A* stored_sum, F* operand);
  // Of one query kind: P = weight[c] * exp(scale * S - shift[c]); dS = scale * P * (dP - delta[c]), in place of the
  // scores; total (+)= P.
  void (*score_gradients)(A* scores, int64_t ld, const A* dprobabilities, A* total, int64_t ldp, int64_t rows,
                          int64_t columns, A scale, const A* shift, const A* weight, const A* delta,
                          bool first);
  void (*scale_columns)(A* values, int64_t ld, int64_t rows, int64_t columns, const A* factor);

  // out (+)= factor * source, or a constant per row.
  void (*combine)(const A* source, int64_t ld, A factor, const A* row_constant, int64_t rows, int64_t columns, A* out,
                  int64_t ldo, bool first);
  // sum[c] += sum_r a[r][c] * b[r][c]
  void (*column_dots)(const F* a, const A* b, int64_t ld, int64_t rows, int64_t columns, A* sum);
  void (*row_sums)(const F* source, int64_t ld, int64_t rows, int64_t columns, A* sum);  // adds
  // out[c] += sum_r factor[r] * source[r][c], in double: a single row is cheap, and what follows may cancel.
  void (*add_scaled_rows)(const T* source, int64_t ld, const A* factor, int64_t rows, int64_t columns, double* out);
  void (*row_dots)(const T* source, int64_t ld, const A* weights, int64_t rows, int64_t columns, A* out);  // adds
  void (*add_outer)(const A* left, const A* right, int64_t rows, int64_t columns, A* out, int64_t ldo);
  void (*softmax)(A* scores, int64_t count, A scale);  // in place
  void (*exponential)(A* values, int64_t count);

  // M = act(1 + A + bias); logits[c] += sum_r M image[r] text[r][c]; returns the penalty's sum (l2, l1) or maximum
  // (linf) over the block; mask (may be null) receives M.
  A (*mask_forward)(const MaskRows<A>& rows, A* logits, A* mask, int64_t mask_ld);
  // The least c * width + r where |M - 1| is `value`.
  int64_t (*mask_find)(const MaskRows<A>& rows, A value, int64_t width);
  // gradient[r][c] = dlogits[c] image[r] text[r][c] + dpenalty * d|M - 1|^n + dmask[r][c] where 1 + A > 0; weighted
  // receives dlogits[c] * M. dmask and weighted may be null. linf's own term is added by the caller.
  void (*mask_backward)(const MaskRows<A>& rows, const A* dlogits, A dpenalty, const A* dmask, int64_t ldm, A* gradient,
                        int64_t ldg, A* weighted, int64_t ldw);
  // With g = scale * drational + weighted: dimage[r] += sum_c g text[r][c]; dtext[r][c] += g image[r].
  void (*feature_gradients)(const A* drational, int64_t ld, A scale, const A* weighted, int64_t ldw, const A* text,
                            int64_t text_ld, const A* image, int64_t rows, int64_t columns, A* dimage, A* dtext,
                            int64_t ldt);
};

RADA_LOOPS(AdapterLoops<float>)
RADA_LOOPS(AdapterLoops<double>)
RADA_LOOPS(AdapterLoops<BF16>)
RADA_LOOPS(AdapterLoops<WideBF16>)

}  // namespace rada_fast
