// Attention over the classes (Eq. 6): several queries, one set of keys and values, scores in tiles that never leave the
// cache. Tiles hold keys in rows and queries in columns, so that a query's sums are vertical.
//
// Forward, per head and block of 128 queries per kind, an online softmax over blocks of 256 keys:
//     S^T = kk [q_text | q_rational],  O^T += vv^T exp(S^T - m)
// "row" keeps one maximum and sum per query; "matrix" one per block, combined over the blocks afterwards, so that the
// one normaliser of the whole K x K matrix needs no second pass. The image query is a single row on the side.
#pragma once

#include "problem.h"

namespace rada_fast {

// What the attention computes for `images` images. Pointers of query kinds that are not in use are null. The arrays of two
// belong to the kinds with a query per class: the text query, where it is in use, and then the rational query.
template <typename A>
struct Attended {
  A* attended[2];              // (images, D, padded), each block normalised by itself; not rounded, for delta
  A* factors[2];               // (images, H, query_blocks): O = factor * attended, 1 / |Q| included
  A* image_attended;           // (images, D), 1 / |Q| included
};

// The inputs of the attention, and everything that its forward writes.
template <typename T>
struct AttentionState : Attended<Acc<T>> {
  const T* keys;               // (images, D, padded)
  const T* values;             // (images, D, padded)
  const Acc<T>* image_query;   // (images, D)
  const T* text_query;         // (D, padded), shared by the images
  const T* rational_query;     // (images, D, padded)
  // Written by the forward: P / |Q| = weight * exp((S - maximum) / (sqrt(d) tau)), with S before it is scaled. The weight
  // is kept apart from the maximum: a logarithm of the sum would be rounded at the size of the scores.
  Acc<T>* maxima[2];           // (images, H, padded), or (images, H) with the matrix softmax
  Acc<T>* weights[2];          // likewise
};

template <typename T>
void class_attention_forward(const Problem& problem, int64_t images, const AttentionState<T>& state);

// Null where a gradient is not needed. The gradients of the attention's output are zero in the padding.
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

// Adds up the kinds: O^T of some classes of one image, (D, columns), into out.
template <typename A>
void combine_attended(const Problem& problem, int64_t b, int64_t first_class, int64_t columns,
                      const Attended<A>& state, A* out, int64_t ldo);

}  // namespace rada_fast
