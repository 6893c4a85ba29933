// The attention of an image encoder, without gradients: softmax(Q K^T / sqrt(d)) V for each head of each image.
//
// Scores are kept transposed, keys in rows and queries in columns, because the adapter's loops go over columns. A task is
// one head of one image, so that a result depends on nothing but its own head's numbers.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "adapter_loops.h"
#include "matrix_product.h"
#include "scratch.h"
#include "score_loops.h"

namespace rada_fast {
namespace {

using at::Tensor;

// The most queries of a block: its scores then fit into the second cache for some hundreds of keys. A multiple of 16, the
// width of a vector.
constexpr int64_t kQueries = 208;

constexpr int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Queries, keys or values: (images, rows, heads * d) with any strides but that of the last dimension.
template <typename T>
struct Rows {
  explicit Rows(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), image(tensor.stride(0)), ld(tensor.stride(1)) {}
  const T* data;
  int64_t image, ld;
};

template <typename T>
void attend(const Tensor& queries_, const Tensor& keys_, const Tensor& values_, int64_t heads, Tensor& out_) {
  using A = Acc<T>;
  constexpr bool interleaved = sizeof(T) == 2;
  const AdapterLoops<T>& loops = chosen_loops<AdapterLoops<T>>();
  const ScoreLoops<T>& score_loops = chosen_loops<ScoreLoops<T>>();
  const Rows<T> queries(queries_), keys(keys_), values(values_);
  const int64_t images = queries_.size(0), n = queries_.size(1), m = keys_.size(1), width = queries_.size(2);
  const int64_t d = width / heads, padded = interleaved ? round_up_to(m, 2) : m;
  const int64_t blocks = (n + kQueries - 1) / kQueries;
  const int64_t block = n < 16 ? n : round_up_to((n + blocks - 1) / blocks, 16);
  const A scale = A(1) / std::sqrt(static_cast<A>(d));
  T* out = static_cast<T*>(out_.mutable_data_ptr());
  at::parallel_for(0, images * heads, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = Scratch::rewound();
    T* operand = scratch.take<T>(d * block);            // Q^T
    T* transposed = scratch.take<T>(d * padded);        // V^T
    A* scores = scratch.take<A>(padded * block);        // S^T
    T* probabilities = interleaved ? scratch.take<T>(padded * block) : reinterpret_cast<T*>(scores);
    A* result = scratch.take<A>(d * block);             // O^T
    T* rounded = interleaved ? scratch.take<T>(d * block) : nullptr;
    A *maximum = scratch.take<A>(block), *sum = scratch.take<A>(block);
    A* stored_sum = interleaved ? scratch.take<A>(block) : sum;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, column = task % heads * d;
      const T* key_rows = keys.data + image * keys.image + column;
      loops.transpose(values.data + image * values.image + column, values.ld, m, d, transposed, padded);
      // An odd last key is paired with probabilities of zero, by which anything finite may be multiplied.
      for (int64_t r = 0; padded > m && r < d; ++r) transposed[r * padded + m] = T{};
      for (int64_t q0 = 0; q0 < n; q0 += block) {
        const int64_t columns = std::min(block, n - q0);
        loops.pack_transposed(queries.data + image * queries.image + q0 * queries.ld + column, queries.ld, columns, d,
                              operand, columns);
        matrix_product<T>(m, columns, d, key_rows, keys.ld, operand, columns, scores, columns, false);
        std::fill(maximum, maximum + columns, -std::numeric_limits<A>::infinity());
        std::fill(sum, sum + columns, A(0));
        std::fill(stored_sum, stored_sum + columns, A(0));
        score_loops.column_maximum(scores, columns, m, columns, maximum);
        score_loops.exponentials(scores, columns, m, columns, scale, maximum, sum, stored_sum, probabilities);
        matrix_product<T>(d, columns, padded, transposed, padded, probabilities, columns, result, columns, false);
        for (int64_t c = 0; c < columns; ++c) stored_sum[c] = A(1) / stored_sum[c];
        loops.scale_columns(result, columns, d, columns, stored_sum);
        T* to = out + (image * n + q0) * width + column;
        if constexpr (interleaved) {
          loops.store(result, columns, nullptr, d, columns, columns, rounded, columns);
          loops.transpose(rounded, columns, d, columns, to, width);
        } else {
          loops.transpose(result, columns, d, columns, to, width);
        }
      }
    }
  });
}

Tensor encoder_attention(const Tensor& queries, const Tensor& keys, const Tensor& values, int64_t heads) {
  TORCH_CHECK(queries.dim() == 3 && keys.dim() == 3 && keys.sizes() == values.sizes() &&
                  queries.size(0) == keys.size(0) && queries.size(2) == keys.size(2),
              "queries must be (N, L', W), keys and values (N, L, W), got ", queries.sizes(), ", ", keys.sizes(), " and ",
              values.sizes());
  TORCH_CHECK(heads > 0 && queries.size(2) % heads == 0, "heads must divide the width ", queries.size(2), ", got ", heads);
  TORCH_CHECK(keys.scalar_type() == queries.scalar_type() && values.scalar_type() == queries.scalar_type(),
              "queries, keys and values must have one type");
  const bool even = queries.size(2) / heads % 2 == 0;
  const auto last = [&](const Tensor& rows) {
    // Pairs of 16-bit numbers are moved as words.
    const bool aligned = rows.element_size() == 4 || (rows.stride(0) % 2 == 0 && rows.stride(1) % 2 == 0 && rows.storage_offset() % 2 == 0);
    return rows.stride(2) == 1 && aligned ? rows : rows.contiguous();
  };
  Tensor out = at::empty(queries.sizes(), queries.options());
  if (out.numel() == 0) return out;
  TORCH_CHECK(keys.size(1) > 0, "keys must have a row");
  switch (queries.scalar_type()) {
    case at::kFloat:
      TORCH_CHECK(has_brgemm_float(), "this processor has no fast product of small float32 matrices");
      attend<float>(last(queries), last(keys), last(values), heads, out);
      break;
    case at::kBFloat16:
      TORCH_CHECK(has_brgemm_bfloat16() && even, "bfloat16 needs a processor that multiplies it, and heads of even width");
      attend<BF16>(last(queries), last(keys), last(values), heads, out);
      break;
    default:
      TORCH_CHECK(false, "queries must be float32 or bfloat16, got ", queries.scalar_type());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(rada_fast, CPU, library) { library.impl("encoder_attention", &encoder_attention); }

}  // namespace rada_fast
