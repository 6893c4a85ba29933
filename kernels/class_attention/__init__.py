"""Attention over classes: the three query kinds against one set of keys and values (RAda, arXiv:2507.15480, Eq. 6).

    S^c[i, j] = q^c[i] . k[j] / (sqrt(d) tau),   O^c[i] = sum_j P^c[i, j] v[j]
    row softmax: P^c[i, :] = softmax(S^c[i, :]);   matrix softmax: P^c = K exp(S^c) / sum_ij exp(S^c)

c is the query kind, and i and j are classes. In each head of width d, q^c are the queries, k the keys, v the values,
S^c the scores and P^c the probabilities.

Both forms share one online softmax by rows: O^c is stored normalised by its own row, together with the row's log-sum.
The matrix form is the same times the factor w^c[i] = K exp(log-sum of row i - log-sum of the whole head). Of a head's
programs, the last one to finish computes these factors, and the mean O of w^c O^c over the query kinds in use, which
the output projection takes. Text and rational queries go through the keys together, so keys and values are read once
for both. The image query is a single row, for which each head has an additional program.

In the backward pass dO . v is the same for all query kinds. Some programs own a tile of queries, others a tile of keys.
No sum uses atomics; they only count the programs that have finished.
"""

from rada_fast.kernels.class_attention.backward import class_attention_backward
from rada_fast.kernels.class_attention.forward import Attended, class_attention_forward
from rada_fast.kernels.class_attention.tiles import Tile, shared_bytes, tile_of

__all__ = ["Attended", "Tile", "class_attention_backward", "class_attention_forward", "shared_bytes", "tile_of"]
