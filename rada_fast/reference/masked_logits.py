"""Mask, masked logits and mask penalty (RAda, arXiv:2507.15480, Eq. 4 and 7)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def rational_mask(offset: Tensor, mask_activation: Literal["relu", "none"]) -> Tensor:
    """Compute the mask M = relu(1 + A), or 1 + A without an activation. offset: A, (B, K, D). Returns (B, K, D)."""
    mask = 1 + offset  # (B, K, D)
    return mask.relu() if mask_activation == "relu" else mask


def masked_logits(mask: Tensor, rational: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute logits[b, k] = s sum_c M[b, k, c] R[b, k, c] (Eq. 4). mask, rational: (B, K, D). Returns (B, K)."""
    return logit_scale * (mask * rational).sum(dim=-1)  # (B, K)


def mask_penalty(mask: Tensor, kind: Literal["l2", "l1", "linf"]) -> Tensor:
    """Compute the penalty L_s on the distance of the mask from 1 (Eq. 7). mask: (B, K, D). Returns a 0-dim tensor.

    l2 is the mean of (M - 1)^2, l1 the mean of |M - 1|, and linf the mean over images of max |M - 1|. The gradient of
    linf goes to one element of each image, the first of equal maxima, as with torch.max in the published code. An empty
    batch gives 0.
    """
    distance = mask - 1  # (B, K, D)
    if mask.numel() == 0:
        return distance.sum()
    if kind == "l2":
        return distance.square().mean()
    if kind == "l1":
        return distance.abs().mean()
    if kind == "linf":
        return distance.abs().flatten(1).max(dim=1).values.mean()
    raise ValueError(f"kind must be one of 'l2', 'l1', 'linf', got {kind!r}")
