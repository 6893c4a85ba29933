"""Prediction entropies and the choice of an episode's most confident views (RAda, arXiv:2507.15480, Sec. 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats; a logit of -inf is a class of probability 0. logits: (..., K). Returns (...).

    Low-precision logits are taken to float32 first.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (..., K)
    log_probabilities = exact.log_softmax(dim=-1)  # (..., K)
    # Where p is 0, so is p ln p and its gradient.
    logarithms = log_probabilities.masked_fill(log_probabilities == -torch.inf, 0.0)  # (..., K)
    return -(log_probabilities.exp() * logarithms).sum(dim=-1)  # (...)


def select_views(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the `count` lowest entropies, ascending, ties by index, and all entropies. logits: (E, V, K)."""
    entropies = prediction_entropy(logits.detach())  # (E, V)
    return entropies.argsort(dim=-1, stable=True)[:, :count].contiguous(), entropies  # (E, count), (E, V)
