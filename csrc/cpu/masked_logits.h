// The output projection, and everything that follows it while its tiles are still in the cache (Eq. 4 and 7):
// A = O Wo^T + bo, M = act(1 + A), logits = s sum_c M R, and the penalty. O is the attention's result, M the mask and R
// the rational matrix. A and R are never written to memory, and M only if the mask itself is asked for.
#pragma once

#include "class_attention.h"

namespace rada_fast {

template <typename T>
struct OutputInputs {
  const Acc<T>* image;  // (images, D)
  const Acc<T>* text;   // (D, padded), T transposed
  const T* weight;      // Wo (D, D), or null where it is zero
  const Acc<T>* bias;   // (D) or null
};

// logits: (images, K), without the factor s. mask: (images, D, K) or null.
// penalty: (images), an image's sum of (M - 1)^2 or |M - 1|, or for linf the maximum of |M - 1|, NaN if M has a NaN.
// offset: A without its bias for the backward pass, (images, D, padded), or null.
// peak: (images), the position k D + c of that maximum, the first one if several are equal.
template <typename T>
void masked_logits_forward(const Problem& problem, int64_t images, const OutputInputs<T>& in,
                           const Attended<Acc<T>>& state, Acc<T>* logits, double* penalty, int64_t* peak,
                           Acc<T>* mask, Acc<T>* offset);

template <typename T>
struct OutputGradients {
  const Acc<T>* dlogits;  // (images, K), multiplied by s
  const Acc<T>* dmask;    // (images, D, K) or null
  const int64_t* peak;    // (images), for linf
  const Acc<T>* offset;   // A as the forward pass kept it, or null where it is computed again
  Acc<T> dpenalty;        // the gradient per element (l2, l1) or per image (linf)
  // The results follow, each null where it is not needed.
  T* doffset;             // dA: (images, D, padded)
  T* attended;            // O as the operand (padded, D), per image
  const T* transposed;    // Wo^T, an input that dattended needs
  T* dattended;           // dO: (images, D, padded)
  Acc<T>* weighted;       // dlogits M: (images, D, padded)
};

template <typename T>
void masked_logits_backward(const Problem& problem, int64_t images, const OutputInputs<T>& in,
                            const Attended<Acc<T>>& state, const OutputGradients<T>& out);

// dWo = dA^T O, added to what dweight holds where `add` is true; dbo += sum dA. Either may be null.
template <typename T>
void output_weight_gradients(const Problem& problem, int64_t images, const T* doffset, const T* attended,
                             Acc<T>* dweight, Acc<T>* dbias, bool add);

}  // namespace rada_fast
