// C (+)= A B on one thread, with the fastest matrix product that PyTorch has; the caller splits the work between threads.
//
// float and bfloat16 go to oneDNN's brgemm kernels through ATen, which take strided blocks as they are and reach nearly
// the same rate at every shape used here. Measured on Zen 5, in float: 252 to 278 GFLOP/s per core with AVX-512 and 129 to
// 137 with AVX2, where MKL's sgemm gives 88 to 114 with either. double, and float where oneDNN has no kernel, go through ATen's mm. A
// processor without products of bfloat16 multiplies float instead (WideBF16): ATen's own product is hundreds of times
// slower.
#pragma once

#include <cstdint>

#include "number_types.h"

namespace rada_fast {

// a: (m, k) rows; b: (k, n) as an operand (adapter_loops.h), k even for bfloat16; c: (m, n) rows.
template <typename T>
void matrix_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, Acc<T>* c,
                    int64_t ldc, bool accumulate);

// The columns of a panel. A right factor that serves many products is kept as panels of so many columns, each with all
// its rows in one piece; the last panel may be narrower, but takes the place of a whole one.
int64_t panel_columns();

// C += A B of float for one panel of B, or some of its rows. b: (k, n) with panel_columns() between its rows.
void panel_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc);

// Rounds a number of columns up to whole vectors: products of columns that fill vectors are faster.
int64_t whole_vectors(int64_t columns);

// Whether oneDNN's brgemm serves this type here.
bool has_brgemm_float();
bool has_brgemm_bfloat16();

}  // namespace rada_fast
