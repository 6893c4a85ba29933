// Output projection with everything after it in its epilogue (Eq. 4 and 7): A = O Wo^T + bo, M = act(1 + A),
// logits = s sum_c M R, penalty. Neither A, M nor R reaches memory unless the mask itself is asked for.
#pragma once

#include "class_attention.h"

namespace rada_fast {

template <typename T>
struct OutputInputs {
  const Acc<T>* image;  // (images, D)
  const Acc<T>* text;   // (D, padded), T transposed
  const T* weight;      // Wo (D, D)
  const Acc<T>* bias;   // (D) or null
};

// logits: (images, K), without the factor s. penalty: (images): the image's sum of (M-1)^2 or |M-1|, or its maximum,
// which lies at peak[image] = k D + c (the first of equal ones). mask: (images, D, K) or null.
template <typename T>
void masked_logits_forward(const Problem& problem, int64_t images, const OutputInputs<T>& in,
                           const Attended<Acc<T>>& state, Acc<T>* logits, double* penalty, int64_t* peak,
                           Acc<T>* mask);

template <typename T>
struct OutputGradients {
  const Acc<T>* dlogits;  // (images, K), times s
  const Acc<T>* dmask;    // (images, D, K) or null
  const int64_t* peak;    // (images), for linf
  Acc<T> dpenalty;        // per element (l2, l1) or per image (linf)
  // Written, each null where it is not needed.
  T* doffset;             // dA: (images, D, padded)
  T* attended;            // O as the operand (padded, D), per image
  const T* transposed;    // Wo^T, with dattended
  T* dattended;           // dO: (images, D, padded)
  Acc<T>* weighted;       // dlogits M: (images, D, padded)
};

template <typename T>
void masked_logits_backward(const Problem& problem, int64_t images, const OutputInputs<T>& in,
                            const Attended<Acc<T>>& state, const OutputGradients<T>& out);

// dWo = dA^T O, added to what dweight holds if `add`; dbo += sum dA; either may be null.
template <typename T>
void output_weight_gradients(const Problem& problem, int64_t images, const T* doffset, const T* attended,
                             Acc<T>* dweight, Acc<T>* dbias, bool add);

}  // namespace rada_fast
