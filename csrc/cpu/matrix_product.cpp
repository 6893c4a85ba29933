#include "matrix_product.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "instruction_set.h"

namespace rada_fast {
namespace {

// ATen throws where oneDNN is switched off or the processor is too old; trying a product is the only public test for it.
template <typename T>
bool brgemm_works() {
  try {
    alignas(64) T a[4] = {}, b[4] = {};
    alignas(64) float c[4] = {};
    at::native::cpublas::brgemm(2, 2, 2, 2, 2, 2, false, a, b, c, sizeof(T) == 2);
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

// ATen exports no raw BLAS; tensors around the pointers cost a few microseconds and serve every build of PyTorch.
template <typename T>
void blas_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                  bool accumulate) {
  const at::AutoDispatchBelowAutograd below_autograd;
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  const auto matrix = [&](const T* pointer, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<T*>(pointer), {rows, columns}, {ld, 1}, at::TensorOptions().dtype(type));
  };
  at::Tensor out = matrix(c, m, n, ldc);
  if (accumulate)
    out.addmm_(matrix(a, m, k, lda), matrix(b, k, n, ldb));
  else
    at::mm_out(out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
}

// The columns and the depth of the block of B that one call of brgemm reads.
struct Block {
  int64_t columns, depth;
};

// brgemm reads its whole block of B again for every few rows of A. With 16 registers of 256 bits it needs a block that
// stays in a first-level cache of 32 KiB. With 32 registers of 512 bits it also reaches its full rate from the second
// level, and needs few columns only to be fast where the number of columns is no multiple of 64.
Block brgemm_block() {
  return level() == Level::avx512 ? Block{64, INT64_MAX} : Block{32, 128};
}

}  // namespace

int64_t whole_vectors(int64_t columns) {
  static const int64_t lanes = level() == Level::avx512 ? 16 : 8;
  return (columns + lanes - 1) / lanes * lanes;
}

int64_t panel_columns() {
  static const int64_t columns = brgemm_block().columns;
  return columns;
}

void panel_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, panel_columns(), ldc, true, a, b, c, false);
}

bool has_brgemm_float() {
  static const bool works = brgemm_works<float>();
  return works;
}
bool has_brgemm_bfloat16() {
  static const bool works = brgemm_works<c10::BFloat16>();
  return works;
}

template <>
void matrix_product<float>(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                           float* c, int64_t ldc, bool accumulate) {
  if (!has_brgemm_float()) {
    blas_product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
    return;
  }
  static const Block block = brgemm_block();
  // Blocks of B are about equally wide: a last block of a single vector would take as long as one of two or three.
  const int64_t lanes = whole_vectors(1), vectors = whole_vectors(n) / lanes;
  const int64_t blocks = (n + block.columns - 1) / block.columns;
  for (int64_t number = 0; number < blocks; ++number) {
    const int64_t n0 = number * vectors / blocks * lanes, end = std::min((number + 1) * vectors / blocks * lanes, n);
    for (int64_t k0 = 0, depth = 0; k0 < k; k0 += depth) {
      depth = std::min(block.depth, k - k0);
      at::native::cpublas::brgemm(m, end - n0, depth, lda, ldb, ldc, accumulate || k0 > 0, a + k0, b + k0 * ldb + n0,
                                  c + n0, false);
    }
  }
}

template <>
void matrix_product<double>(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
                            int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  blas_product(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

template <>
void matrix_product<BF16>(int64_t m, int64_t n, int64_t k, const BF16* a, int64_t lda, const BF16* b, int64_t ldb,
                          float* c, int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

}  // namespace rada_fast
