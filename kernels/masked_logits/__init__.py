"""Output projection, mask, masked logits and mask penalty (RAda, arXiv:2507.15480, Eq. 4 and 7).

    A = O Wo^T + bo,   M = relu(1 + A) or 1 + A,   logits[b, k] = s sum_c M[b, k, c] R[b, k, c]
    dA = (s dlogits R + dL_s/dM) 1[1 + A > 0 or no relu],   dO = dA Wo

O is the result of the attention over classes, Wo and bo the output projection's weight and bias, A the mask's offset, M
the mask, R the rational matrix and L_s the penalty on the mask.

A program of the forward pass owns a tile of rows and a block of columns of A. It computes R at the end. M is written to
memory if it is asked for, and M - 1 if a backward pass follows, which computes dA from it element by element. Each sum
over columns is stored as one part for each chunk of columns. Of the programs that share rows, the last one to finish
adds the parts in order.
"""

from rada_fast.kernels.masked_logits.backward import MaskedLogitsGradients, masked_logits_backward
from rada_fast.kernels.masked_logits.forward import MaskedLogits, counters_needed, masked_logits_forward
from rada_fast.kernels.masked_logits.tiles import Tile, shared_bytes, tile_of

__all__ = [
    "MaskedLogits",
    "MaskedLogitsGradients",
    "Tile",
    "counters_needed",
    "masked_logits_backward",
    "masked_logits_forward",
    "shared_bytes",
    "tile_of",
]
