"""Multi-query attention over the classes (RAda, arXiv:2507.15480, Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


def attention_probabilities(scores: Tensor, softmax: Literal["matrix", "row"], num_classes: int) -> Tensor:
    """Turn the scores of one query kind into probabilities; low-precision scores are normalised in float32.

        row:    P[i, :] = softmax_j S[i, :]
        matrix: P = K exp(S) / sum_ij exp(S), one normaliser for a head's whole K x K matrix

    scores: (B, H, I, K), where I is K, or 1 for a query that is the same for every class. The K rows of such a query
    are equal, so its matrix form is the row form. The maximum is subtracted before the exponential.
    """
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (B, H, I, K)
    if softmax == "row" or scores.shape[-2] != num_classes:
        return exact.softmax(dim=-1).to(scores.dtype)  # (B, H, I, K)
    flat = exact.flatten(-2).softmax(dim=-1)  # (B, H, K * K)
    return (num_classes * flat.unflatten(-1, (num_classes, num_classes))).to(scores.dtype)  # (B, H, K, K)


def class_attention(
    queries: Iterable[Tensor],
    keys: Tensor,
    values: Tensor,
    *,
    temperature: float,
    softmax: Literal["matrix", "row"],
) -> Tensor:
    """Compute the attention over classes, averaged over the query kinds.

        S^c = q^c kk^T / (sqrt(d) tau),   O = (1 / |Q|) sum_c P^c vv

    queries: each (B or 1, H, K or 1, d); keys, values: (B, H, K, d). Returns the merged heads, (B, K, D).
    """
    queries = list(queries)
    num_classes, head_dim = keys.shape[-2:]
    total: Tensor | None = None
    for query in queries:
        scores = query @ keys.mT / (head_dim**0.5 * temperature)  # (B, H, K | 1, K)
        probabilities = attention_probabilities(scores, softmax, num_classes)  # (B, H, K | 1, K)
        # One product with the values serves all query kinds; the single image row broadcasts here.
        total = probabilities if total is None else total + probabilities  # (B, H, K | 1, K)
    assert total is not None
    attended = (total / len(queries)) @ values  # (B, H, K | 1, d)
    attended = attended.expand(-1, -1, num_classes, -1)  # (B, H, K, d)
    return attended.transpose(-3, -2).flatten(-2)  # (B, K, D)
