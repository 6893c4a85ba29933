"""Choose an episode's most confident views (RAda, arXiv:2507.15480, Sec. 4.3)."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from rada_fast.ops._backends.choice import resolve_backend
from rada_fast.ops._predictions import check_logits, is_compiled
from rada_fast.ops.rational_adapter import zero_shot_logits


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


class KeptViews(NamedTuple):
    """Hold the features (E, n, D) of kept views, and the original views' features (E, D) and logits (E, K) by CLIP."""

    kept: Tensor
    originals: Tensor
    logits: Tensor


def keep_views(view_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, count: int) -> KeptViews:
    """Keep the `count` views of each episode of whose classes CLIP is the most certain, in the order of select_views.

    An episode's results are the same to the bit however many episodes there are. On CUDA this takes two launches, which
    compute the products in float32 whatever type the features have.

    view_features: (E, V, D), the original view first, V >= 1, at unit norm.
    text_features: T (K, D), of the same type and on the same device.
    logit_scale: the multiplier s, a number or a tensor of one on the same device.
    count: the number of views to keep, from 0 to V.

    Returns KeptViews(kept (E, count, D), originals (E, D), logits (E, K)), without gradients.
    Raises ValueError or TypeError naming the argument, BackendUnavailableError where a named backend cannot serve.
    Equivalent to ``select_views(logit_scale * view_features @ text_features.mT, count)`` and a gather.
    """
    if view_features.ndim != 3 or view_features.shape[1] == 0:
        raise ValueError(f"view_features must be (E, V, D) with V >= 1, got {tuple(view_features.shape)}")
    if not 0 <= count <= view_features.shape[1]:
        raise ValueError(f"count must be from 0 to V = {view_features.shape[1]}, got {count}")
    views, text = view_features.detach(), text_features.detach()
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale

    def refusal(name: str) -> str | None:
        if name != "triton":
            return None
        from rada_fast.ops._backends.triton_views import reason_not_served

        return reason_not_served(views)

    if len(views) and resolve_backend(None, refusal) == "triton":
        from rada_fast.ops._backends.triton_views import keep_views as fused

        return KeptViews(*fused(views, text, scale, count))
    # Libraries choose how to compute a product by its shape, and this choice decides about the last bits. So every
    # episode has a product of its own.
    products = [zero_shot_logits(own, text, scale) for own in views]
    logits = torch.stack(products) if products else views.new_empty((0, views.shape[1], len(text)))  # (E, V, K)
    return KeptViews(gather_views(views, select_views(logits, count)), views[:, 0], logits[:, 0])


def gather_views(view_features: Tensor, indices: Tensor) -> Tensor:
    """Return the features (E, n, D) of the views (E, V, D) with these indices (E, n)."""
    return view_features.gather(1, indices[..., None].expand(-1, -1, view_features.shape[2]))
