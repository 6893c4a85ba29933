// Projections of the rational matrix R (Eq. 2 and 6): W (s R[b])^T + bias. R itself is computed tile by tile as an
// operand.
#pragma once

#include "problem.h"

namespace rada_fast {

template <typename T>
struct Projection {
  const Factor<T>* weight;  // (D, D)
  const Acc<T>* bias;     // (D) or null
  T* out;                 // (images, D, padded)
};

// image: (images, D); text: (D, padded), T transposed.
template <typename T>
void rational_projections(const Problem& problem, int64_t images, const Acc<T>* image, const Acc<T>* text,
                          const Projection<T>* projections, int64_t count);

template <typename T>
struct ProjectionGradient {
  const T* gradient;      // the gradient of the projection's output: (images, D, padded)
  Acc<T>* dweight;        // (D, D), or null
  Acc<T>* dbias;          // (D), which is added to, or null
  bool add;               // whether to add to what dweight holds; otherwise dweight is written without being read
};

// text_rows: (K, D), T without padding.
template <typename T>
void rational_projection_gradients(const Problem& problem, int64_t images, const Acc<T>* image, const Acc<T>* text_rows,
                                   const ProjectionGradient<T>* projections, int64_t count);

// Adds the gradients through R to dimage (images, D) and dtext (D, padded). The gradient of R is sum_w W_w^T dout_w
// from the projections w plus `weighted` directly from the logits.
//   transposed[w]   W_w^T, (D, D)
//   gradients[w]    dout_w, (images, D, padded)
//   weighted        logit_scale * dlogits * M, (images, D, padded)
// Results do not depend on the number of threads: a tile of classes belongs to one thread, and images are added in order.
template <typename T>
void rational_matrix_gradients(const Problem& problem, int64_t images, const Acc<T>* image, const Acc<T>* text,
                               const T* const* transposed, const T* const* gradients, int64_t count,
                               const Acc<T>* weighted, Acc<T>* dimage, Acc<T>* dtext);

}  // namespace rada_fast
