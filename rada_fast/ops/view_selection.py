"""Choose an episode's most confident views (RAda, arXiv:2507.15480, Sec. 4.3)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from rada_fast.ops._predictions import check_logits, is_compiled


@overload
def select_views(logits: Tensor, count: int, *, return_entropies: Literal[False] = ...) -> Tensor: ...
@overload
def select_views(logits: Tensor, count: int, *, return_entropies: Literal[True]) -> tuple[Tensor, Tensor]: ...
def select_views(logits: Tensor, count: int, *, return_entropies: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Return the indices of the `count` views with the lowest prediction entropy H, in ascending order, ties by index.

        p = softmax(logits),   H = -sum_k p_k ln p_k

    Equal rows have equal entropies bit for bit, so their order is that of their indices. A logit of -inf gives its
    class the probability 0. A row with a NaN or +inf, or with nothing but -inf, has entropy NaN and comes last.

    logits: (E, V, K), or (V, K) for one episode; float32|float64|bfloat16|float16, V >= 1, K >= 1, any stride.
    count: the number of views to choose, from 0 to V.
    return_entropies: also return all entropies, in nats.

    Returns indices (E, count) int64, or (count,), on the logits' device, without waiting for it; with return_entropies
    also entropies (E, V), or (V,): float32, float64 for float64. The results have no gradients.
    Raises TypeError or ValueError naming the argument, BackendUnavailableError where a named backend cannot serve.
    Equivalent to ``prediction_entropy(logits).argsort(dim=-1, stable=True)[..., :count]``.
    """
    check_logits(logits, "(E, V, K) or (V, K) with V >= 1 and K >= 1")
    if not 0 <= count <= logits.shape[-2]:
        raise ValueError(f"count must be from 0 to V = {logits.shape[-2]}, got {count}")
    batched = logits.detach() if logits.ndim == 3 else logits.detach()[None]
    if is_compiled(logits):
        indices, entropies = torch.ops.rada_fast.select_views(batched, count)
    else:
        from rada_fast.reference.view_selection import select_views as reference

        indices, entropies = reference(batched, count)
    if logits.ndim == 2:
        indices, entropies = indices[0], entropies[0]
    return (indices, entropies) if return_entropies else indices
