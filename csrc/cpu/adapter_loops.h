// The adapter's loops around its matrix products: packing, sums, epilogues. score_loops.h has those of the attention's
// scores. See instruction_set.h.
//
// Arrays are row-major; `ld` is the distance between rows in elements. An operand is the right factor of a product. For
// float and double it has plain rows. For bfloat16 its rows are interleaved in pairs, [rows / 2][columns][2], and an odd
// last row is paired with zeros. A is the mask's offset and M the mask.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "number_types.h"

namespace rada_fast {

// The kind of the penalty L_s on the mask (Eq. 7).
enum class Penalty : int { none, l2, l1, linf };

// A block of the mask before its activation, with everything that the block's logits and penalty depend on.
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
  // operand = the transpose of source (rows, columns); bfloat16 needs an even number of columns.
  void (*pack_transposed)(const T* source, int64_t ld, int64_t rows, int64_t columns, F* operand, int64_t ldo);

  void (*transpose)(const T* source, int64_t ld, int64_t rows, int64_t columns, F* out, int64_t ldo);
  void (*transpose_exact)(const A* source, int64_t ld, int64_t rows, int64_t columns, A* out, int64_t ldo);
  // out = source + bias[r], then zeros up to `padded` columns; bias may be null.
  void (*store)(const A* source, int64_t ld, const A* bias, int64_t rows, int64_t columns, int64_t padded, T* out,
                int64_t ldo);
  void (*store_exact)(const A* source, int64_t ld, const A* bias, int64_t rows, int64_t columns, int64_t padded, A* out,
                      int64_t ldo);

  void (*scale_columns)(A* values, int64_t ld, int64_t rows, int64_t columns, const A* factor);

  // out = factor * source + row_constant[r], or where `first` is false, this is added to out. source and row_constant may
  // be null.
  void (*combine)(const A* source, int64_t ld, A factor, const A* row_constant, int64_t rows, int64_t columns, A* out,
                  int64_t ldo, bool first);
  // sum[c] += sum_r a[r][c] * b[r][c]
  void (*column_dots)(const F* a, const A* b, int64_t ld, int64_t rows, int64_t columns, A* sum);
  void (*row_sums)(const F* source, int64_t ld, int64_t rows, int64_t columns, A* sum);  // adds to sum
  // out[c] += sum_r factor[r] * source[r][c], in double: a single row is cheap, and later differences may cancel.
  void (*add_scaled_rows)(const T* source, int64_t ld, const A* factor, int64_t rows, int64_t columns, double* out);
  void (*row_dots)(const T* source, int64_t ld, const A* weights, int64_t rows, int64_t columns, A* out);  // adds to out
  void (*add_outer)(const A* left, const A* right, int64_t rows, int64_t columns, A* out, int64_t ldo);
  // M = act(1 + A + bias); logits[c] += sum_r M image[r] text[r][c]. Returns the penalty's sum (l2, l1) or maximum (linf,
  // NaN if an element of M is NaN) over the block. mask receives M and may be null.
  A (*mask_forward)(const MaskRows<A>& rows, A* logits, A* mask, int64_t mask_ld);
  // Returns the least c * width + r where |M - 1| is `value`, which may be NaN.
  int64_t (*mask_find)(const MaskRows<A>& rows, A value, int64_t width);
  // gradient[r][c] = dlogits[c] image[r] text[r][c] + dpenalty * d|M - 1|^n + dmask[r][c] where 1 + A > 0. weighted
  // receives dlogits[c] * M. dmask and weighted may be null. The caller adds the term of linf.
  void (*mask_backward)(const MaskRows<A>& rows, const A* dlogits, A dpenalty, const A* dmask, int64_t ldm, A* gradient,
                        int64_t ldg, A* weighted, int64_t ldw);
  // With g = scale * drational + weighted: dimage[r] += sum_c g text[r][c]; dtext[r][c] += g image[r].
  void (*feature_gradients)(const A* drational, int64_t ld, A scale, const A* weighted, int64_t ldw, const A* text,
                            int64_t text_ld, const A* image, int64_t rows, int64_t columns, A* dimage, A* dtext,
                            int64_t ldt);
};

#define RADA_ADAPTER_LOOPS(T) RADA_LOOPS(AdapterLoops<T>)
RADA_STORED_TYPES(RADA_ADAPTER_LOOPS)
#undef RADA_ADAPTER_LOOPS

}  // namespace rada_fast
