// Projections of the rational matrix (Eq. 2 and 6): W (s R[b])^T + bias, with R formed tile by tile as the operand.
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
  const T* gradient;      // of the projection's output: (images, D, padded)
  Acc<T>* dweight;        // (D, D), or null
  Acc<T>* dbias;          // (D) to add to, or null
  bool add;               // to what dweight holds; else dweight is written without being read
};

// rows: (K, D), T as it is.
template <typename T>
void rational_projection_gradients(const Problem& problem, int64_t images, const Acc<T>* image, const Acc<T>* text_rows,
                                   const ProjectionGradient<T>* projections, int64_t count);

// df and dT through R: the projections' input gradients sum_w W_w^T dout_w, and what came past them (weighted).
// transposed[w]: W_w^T (D, D). weighted: (images, D, padded), logit_scale * dlogits * M. Adds to dimage (images, D)
// and dtext (D, padded). Deterministic: a class tile belongs to one thread, and images add up in order.
template <typename T>
void rational_matrix_gradients(const Problem& problem, int64_t images, const Acc<T>* image, const Acc<T>* text,
                               const T* const* transposed, const T* const* gradients, int64_t count,
                               const Acc<T>* weighted, Acc<T>* dimage, Acc<T>* dtext);

}  // namespace rada_fast
