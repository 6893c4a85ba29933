"""Prediction entropies and the choice of an episode's most confident views (RAda, arXiv:2507.15480, Sec. 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def prediction_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of softmax(logits) in nats. logits: (..., K). Returns (...).

    A logit of -inf is a class of probability 0. Low-precision logits are converted to float32 first.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (..., K)
    log_probabilities = exact.log_softmax(dim=-1)  # (..., K)
    # Where p is 0, p ln p and its gradient are 0 too.
    logarithms = log_probabilities.masked_fill(log_probabilities == -torch.inf, 0.0)  # (..., K)
    return -(log_probabilities.exp() * logarithms).sum(dim=-1)  # (...)


def select_views(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the `count` lowest entropies of each episode and all entropies. logits: (E, V, K).

    The indices are in ascending order of the entropies; views with equal entropies keep their order.
    """
    entropies = prediction_entropy(logits.detach())  # (E, V)
    return entropies.argsort(dim=-1, stable=True)[:, :count].contiguous(), entropies  # (E, count), (E, V)
