#include "adapter_loops.h"

#include <cmath>
#include <cstring>

#include "bfloat16_pairs.h"
#include "vector_scalars.h"

namespace rada_fast::RADA_CAPABILITY {
namespace {

// Whether a product multiplies wider values than memory holds.
template <typename T>
constexpr bool kWidened = sizeof(Factor<T>) > sizeof(T);

// A stored value in the type that products multiply.
template <typename T>
inline Factor<T> factor_of(T x) {
  if constexpr (kWidened<T>)
    return load(x);
  else
    return x;
}

template <typename A>
inline A one(const A* scale, int64_t i) {
  return scale ? scale[i] : A(1);
}

template <typename T, typename A>
void pack(const A* source, int64_t ld, const A* row_scale, const A* column_scale, int64_t rows, int64_t columns,
          T* operand, int64_t ldo) {
  if constexpr (sizeof(T) == 2) {
    for (int64_t r = 0; r < rows; r += 2) {
      const bool last = r + 1 == rows;
      pack_pair(source + r * ld, source + (last ? r : r + 1) * ld, one(row_scale, r), last ? A(0) : one(row_scale, r + 1),
                column_scale, columns, operand + r * ldo);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = source + r * ld;
      const A factor = one(row_scale, r);
      T* out = operand + r * ldo;
      if (column_scale) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) out[c] = row[c] * factor * column_scale[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) out[c] = row[c] * factor;
      }
    }
  }
}

template <typename T>
void pack_stored(const T* source, int64_t ld, int64_t rows, int64_t columns, Factor<T>* operand, int64_t ldo) {
  if constexpr (kWidened<T>) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = source + r * ld;
      float* to = operand + r * ldo;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = load(from[c]);
    }
  } else if constexpr (sizeof(T) == 2) {
    for (int64_t r = 0; r < rows; r += 2) {
      const T* even = source + r * ld;
      const T* odd = r + 1 < rows ? even + ld : even;
      const uint32_t keep = r + 1 < rows ? 0xffff0000u : 0u;
      auto* pairs = reinterpret_cast<uint32_t*>(operand + r * ldo);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c)
        pairs[c] = even[c].bits | ((static_cast<uint32_t>(odd[c].bits) << 16) & keep);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(operand + r * ldo, source + r * ld, columns * sizeof(T));
  }
}

template <typename T>
void transpose(const T* source, int64_t ld, int64_t rows, int64_t columns, Factor<T>* out, int64_t ldo) {
  constexpr int64_t edge = 16;
  int64_t r = 0;
  for (; r + edge <= rows; r += edge) {
    int64_t c = 0;
    for (; c + edge <= columns; c += edge) {
      Factor<T> tile[edge][edge];
      for (int64_t i = 0; i < edge; ++i)
        for (int64_t j = 0; j < edge; ++j) tile[i][j] = factor_of(source[(r + i) * ld + c + j]);
      for (int64_t j = 0; j < edge; ++j)
        for (int64_t i = 0; i < edge; ++i) out[(c + j) * ldo + r + i] = tile[i][j];
    }
    for (; c < columns; ++c)
      for (int64_t i = 0; i < edge; ++i) out[c * ldo + r + i] = factor_of(source[(r + i) * ld + c]);
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * ldo + r] = factor_of(source[r * ld + c]);
}

template <typename T>
void pack_transposed(const T* source, int64_t ld, int64_t rows, int64_t columns, Factor<T>* operand, int64_t ldo) {
  if constexpr (sizeof(Factor<T>) == 2)
    // Neighbours in a row become an interleaved pair: a transpose of 32-bit words.
    transpose(reinterpret_cast<const uint32_t*>(source), ld / 2, rows, columns / 2, reinterpret_cast<uint32_t*>(operand),
              ldo);
  else
    transpose(source, ld, rows, columns, operand, ldo);
}

template <typename T, typename A>
void store(const A* source, int64_t ld, const A* bias, int64_t rows, int64_t columns, int64_t padded, T* out,
           int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* from = source + r * ld;
    const A constant = bias ? bias[r] : A(0);
    T* to = out + r * ldo;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) put(to[c], from[c] + constant);
    for (int64_t c = columns; c < padded; ++c) put(to[c], A(0));
  }
}

template <typename A>
void scale_columns(A* values, int64_t ld, int64_t rows, int64_t columns, const A* factor) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = values + r * ld;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) row[c] *= factor[c];
  }
}

template <typename A>
void combine(const A* source, int64_t ld, A factor, const A* row_constant, int64_t rows, int64_t columns, A* out,
             int64_t ldo, bool first) {
  for (int64_t r = 0; r < rows; ++r) {
    A* to = out + r * ldo;
    const A constant = row_constant ? row_constant[r] : A(0);
    if (!source) {
      for (int64_t c = 0; c < columns; ++c) to[c] = first ? constant : to[c] + constant;
      continue;
    }
    const A* from = source + r * ld;
    if (first) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = factor * from[c] + constant;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] += factor * from[c] + constant;
    }
  }
}

// A step adds four rows: this needs fewer passes over the sums, and makes a shorter chain of roundings.
template <typename T, typename A>
void column_dots(const T* a, const A* b, int64_t ld, int64_t rows, int64_t columns, A* sum) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T* x = a + r * ld;
    const A* y = b + r * ld;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const A low = load(x[c]) * y[c] + load(x[c + ld]) * y[c + ld];
      const A high = load(x[c + 2 * ld]) * y[c + 2 * ld] + load(x[c + 3 * ld]) * y[c + 3 * ld];
      sum[c] += low + high;
    }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) sum[c] += load(a[r * ld + c]) * b[r * ld + c];
}

template <typename T, typename A>
void row_sums(const T* source, int64_t ld, int64_t rows, int64_t columns, A* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source + r * ld;
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < columns; ++c) total += load(row[c]);
    sum[r] += total;
  }
}

template <typename T, typename A>
void add_scaled_rows(const T* source, int64_t ld, const A* factor, int64_t rows, int64_t columns, double* out) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const T* x = source + r * ld;
    const double f0 = factor[r], f1 = factor[r + 1];
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c)
      out[c] += f0 * static_cast<double>(load(x[c])) + f1 * static_cast<double>(load(x[c + ld]));
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out[c] += static_cast<double>(factor[r]) * static_cast<double>(load(source[r * ld + c]));
}

template <typename T, typename A>
void row_dots(const T* source, int64_t ld, const A* weights, int64_t rows, int64_t columns, A* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source + r * ld;
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < columns; ++c) total += load(row[c]) * weights[c];
    out[r] += total;
  }
}

template <typename A>
void add_outer(const A* left, const A* right, int64_t rows, int64_t columns, A* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    const A f = left[r];
    A* to = out + r * ldo;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] += f * right[c];
  }
}

// Returns M for 1 + A. A NaN is not below 0, so it stays NaN, as in PyTorch.
template <typename A>
inline A opened(A open, bool relu) {
  return relu && open < 0 ? A(0) : open;
}

template <typename A, bool relu, Penalty penalty>
A mask_forward_of(const MaskRows<A>& in, A* logits, A* mask, int64_t mask_ld) {
  A total = 0;
  for (int64_t r = 0; r < in.rows; ++r) {
    const A *offset = in.offset + r * in.ld, *text = in.text + r * in.text_ld;
    const A constant = A(1) + (in.bias ? in.bias[r] : A(0)), f = in.image[r];
    A row_total = 0;
#pragma omp simd reduction(+ : row_total)
    for (int64_t c = 0; c < in.columns; ++c) {
      const A open = offset[c] + constant;
      const A m = opened(open, relu);
      logits[c] += m * f * text[c];
      const A distance = m - A(1);
      if constexpr (penalty == Penalty::l2) row_total += distance * distance;
      if constexpr (penalty == Penalty::l1) row_total += distance < 0 ? -distance : distance;
    }
    if constexpr (penalty == Penalty::linf) {
      A nans = 0;  // NaNs are counted separately, because a NaN never becomes the maximum here
#pragma omp simd reduction(max : row_total) reduction(+ : nans)
      for (int64_t c = 0; c < in.columns; ++c) {
        const A open = offset[c] + constant;
        const A distance = opened(open, relu) - A(1);
        const A size = distance < 0 ? -distance : distance;
        row_total = row_total < size ? size : row_total;
        nans += size != size ? A(1) : A(0);
      }
      total = total != total || nans > 0 ? A(NAN) : (total < row_total ? row_total : total);
    } else {
      total += row_total;
    }
    if (mask)
      for (int64_t c = 0; c < in.columns; ++c) {
        const A open = offset[c] + constant;
        mask[r * mask_ld + c] = opened(open, relu);
      }
  }
  return total;
}

template <typename A, bool relu>
A mask_forward_with(const MaskRows<A>& in, A* logits, A* mask, int64_t mask_ld) {
  switch (in.penalty) {
    case Penalty::l2: return mask_forward_of<A, relu, Penalty::l2>(in, logits, mask, mask_ld);
    case Penalty::l1: return mask_forward_of<A, relu, Penalty::l1>(in, logits, mask, mask_ld);
    case Penalty::linf: return mask_forward_of<A, relu, Penalty::linf>(in, logits, mask, mask_ld);
    default: return mask_forward_of<A, relu, Penalty::none>(in, logits, mask, mask_ld);
  }
}
template <typename A>
A mask_forward(const MaskRows<A>& in, A* logits, A* mask, int64_t mask_ld) {
  return in.relu ? mask_forward_with<A, true>(in, logits, mask, mask_ld)
                 : mask_forward_with<A, false>(in, logits, mask, mask_ld);
}

template <typename A>
int64_t mask_find(const MaskRows<A>& in, A value, int64_t width) {
  int64_t least = INT64_MAX;
  for (int64_t r = 0; r < in.rows; ++r) {
    const A constant = A(1) + (in.bias ? in.bias[r] : A(0));
    for (int64_t c = 0; c < in.columns; ++c) {
      const A open = in.offset[r * in.ld + c] + constant;
      const A distance = opened(open, in.relu) - A(1), size = distance < 0 ? -distance : distance;
      const bool found = size == value || (size != size && value != value);
      const int64_t at = c * width + r;
      if (found && at < least) least = at;
    }
  }
  return least;
}

template <typename A>
void mask_backward(const MaskRows<A>& in, const A* dlogits, A dpenalty, const A* dmask, int64_t ldm, A* gradient,
                   int64_t ldg, A* weighted, int64_t ldw) {
  const A square = in.penalty == Penalty::l2 ? 2 * dpenalty : A(0);
  const A sign = in.penalty == Penalty::l1 ? dpenalty : A(0);
  for (int64_t r = 0; r < in.rows; ++r) {
    const A *offset = in.offset + r * in.ld, *text = in.text + r * in.text_ld;
    A* out = gradient + r * ldg;
    const A constant = A(1) + (in.bias ? in.bias[r] : A(0)), f = in.image[r];
    const A floor = in.relu ? A(0) : A(-HUGE_VAL);
#pragma omp simd
    for (int64_t c = 0; c < in.columns; ++c) {
      const A open = offset[c] + constant;
      const A distance = open - A(1);
      const A step = distance > 0 ? sign : (distance < 0 ? -sign : A(0));
      const A g = dlogits[c] * f * text[c] + square * distance + step;
      out[c] = open <= floor ? A(0) : g;
    }
    if (dmask)
      for (int64_t c = 0; c < in.columns; ++c) out[c] += offset[c] + constant <= floor ? A(0) : dmask[r * ldm + c];
    if (weighted)
      for (int64_t c = 0; c < in.columns; ++c) {
        const A open = offset[c] + constant;
        weighted[r * ldw + c] = open <= floor ? A(0) : dlogits[c] * open;
      }
  }
}

template <typename A>
void feature_gradients(const A* drational, int64_t ld, A scale, const A* weighted, int64_t ldw, const A* text,
                       int64_t text_ld, const A* image, int64_t rows, int64_t columns, A* dimage, A* dtext,
                       int64_t ldt) {
  for (int64_t r = 0; r < rows; ++r) {
    const A *from = drational + r * ld, *w = weighted + r * ldw, *t = text + r * text_ld;
    A* to = dtext + r * ldt;
    const A f = image[r];
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < columns; ++c) {
      const A g = scale * from[c] + w[c];
      total += g * t[c];
      to[c] += g * f;
    }
    dimage[r] += total;
  }
}

template <typename T>
const AdapterLoops<T>& table() {
  using A = Acc<T>;
  using F = Factor<T>;
  static const AdapterLoops<T> loops{
      pack<F, A>,         pack_stored<T>,    pack_transposed<T>, transpose<T>,         transpose<A>,
      store<T, A>,        store<A, A>,       scale_columns<A>,   combine<A>,           column_dots<F, A>,
      row_sums<F, A>,     add_scaled_rows<T, A>, row_dots<T, A>, add_outer<A>,         mask_forward<A>,
      mask_find<A>,       mask_backward<A>,  feature_gradients<A>};
  return loops;
}

}  // namespace

#define RADA_DEFINE(T)              \
  template <>                       \
  const AdapterLoops<T>& loops() {  \
    return table<T>();              \
  }
RADA_STORED_TYPES(RADA_DEFINE)
#undef RADA_DEFINE

}  // namespace rada_fast::RADA_CAPABILITY
