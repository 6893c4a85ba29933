// Attention over the classes (Eq. 6): several kinds of queries attend to one set of keys and values. Scores are
// computed in tiles that never leave the cache. Tiles hold keys in rows and queries in columns, so sums over keys add
// rows.
//
// The forward pass runs an online softmax over blocks of 256 keys, for each head and block of 128 queries per kind:
//     S^T = kk [q_text | q_rational],  O^T += vv^T exp(S^T - m)
// kk are the keys, vv the values, q the queries, S the scores, m the running maxima and O the result. The "row" softmax
// keeps one maximum and sum per query. The "matrix" softmax keeps one per block and combines the blocks afterwards, so the
// normaliser of the whole K x K matrix needs no second pass. The image query is a single row, computed separately.
//
// Where heads are wide and classes not too many, the "row" softmax keeps the scores of a block of queries with all keys
// instead. All sums are then known before the product with the values, and one product serves both kinds: these are merged.
// The backward pass computes delta (class_attention_backward.cpp) from the probabilities, because the kinds have no result
// each of their own. The "matrix" softmax has a sum for all queries of a head, so that it keeps the exponentials of a whole
// head. It has one delta for them too, which would take a pass over all probabilities. Its kinds are therefore merged only
// where no backward pass follows (merged_matrix_attention.cpp).
#pragma once

#include "problem.h"

namespace rada_fast {

// The results of the attention for `images` images. Pointers of query kinds that are not in use are null. The arrays of
// length two belong to the kinds with a query per class: the text query, if it is in use, and then the rational query.
// Merged kinds have one result, the first. |Q| is the number of query kinds in use.
template <typename A>
struct Attended {
  A* attended[2];              // (images, D, padded), each block normalised by itself; not rounded, because of delta
  A* factors[2];               // (images, H, query_blocks): O = factor * attended, where the factor includes 1 / |Q|
  A* image_attended;           // (images, D), multiplied by 1 / |Q|
};

// The inputs of the attention, and everything that its forward pass writes.
template <typename T>
struct AttentionState : Attended<Acc<T>> {
  const T* keys;               // (images, D, padded)
  const T* values;             // (images, D, padded)
  const Acc<T>* image_query;   // (images, D)
  const T* text_query;         // (D, padded), shared by the images
  const T* rational_query;     // (images, D, padded)
  // Written by the forward pass: P / |Q| = weight * exp((S - maximum) / (sqrt(d) tau)), where S is not yet scaled. The
  // weight is kept apart from the maximum, because one logarithm for both would be rounded at the size of the scores.
  Acc<T>* maxima[2];           // (images, H, padded), or (images, H) with the matrix softmax
  Acc<T>* weights[2];          // of the same shape
};

template <typename T>
void class_attention_forward(const Problem& problem, int64_t images, const AttentionState<T>& state);

// The same for merged kinds of the matrix softmax, float and double. It writes no maxima and no weights.
template <typename T>
void merged_matrix_attention(const Problem& problem, int64_t images, const AttentionState<T>& state);

// A pointer is null where its gradient is not needed. The gradients of the attention's output are zero in the padding.
template <typename T>
struct AttentionGradients {
  const Factor<T>* doutput;    // dO: (images, D, padded)
  Factor<T>* dkeys;            // (images, D, padded)
  Factor<T>* dvalues;
  Factor<T>* drational_query;
  Acc<T>* dtext_query;         // (images, D, padded)
  Acc<T>* dimage_query;        // (images, D)
};

template <typename T>
void class_attention_backward(const Problem& problem, int64_t images, const AttentionState<T>& state,
                              const AttentionGradients<T>& gradients);

// Adds up the query kinds: writes O^T of some classes of one image, (D, columns), into out.
template <typename A>
void combine_attended(const Problem& problem, int64_t b, int64_t first_class, int64_t columns,
                      const Attended<A>& state, A* out, int64_t ldo);

}  // namespace rada_fast
