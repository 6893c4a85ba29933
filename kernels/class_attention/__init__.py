"""Attention over classes: the three query kinds against one set of keys and values (RAda, arXiv:2507.15480, Eq. 6).

    S^c[i, j] = q^c[i] . k[j] / (sqrt(d) tau)
    row softmax: P^c[i, :] = softmax(S^c[i, :]);   matrix softmax: P^c = K exp(S^c) / sum_ij exp(S^c)

Both forms share one online softmax by rows: O^c is stored normalised by its own row, and the row's log-sum with it. The
matrix form is the same times w[i] = K exp(logsum[i] - logsum of the whole head), which a small launch computes and the
kernels that read O^c multiply by. Text and rational queries go through the keys together, so that keys and values are
read once for both. The image query is a single row, for which each head has an additional program.

In the backward pass dO . v is the same for all query kinds. One launch owns tiles of queries and another one tiles of
keys; for the row softmax a small launch before them adds up its deltas. Nothing is added up by atomics.
"""

from rada_fast.kernels.class_attention.backward import class_attention_backward
from rada_fast.kernels.class_attention.forward import Attended, class_attention_forward
from rada_fast.kernels.class_attention.tiles import Tile, tile_of

__all__ = ["Attended", "Tile", "class_attention_backward", "class_attention_forward", "tile_of"]
