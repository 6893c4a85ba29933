"""Losses over predictions: entropies (RAda, arXiv:2507.15480, Eq. 5, and TPT's marginal form) and cross-entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rada_fast.reference.view_selection import prediction_entropy


def prediction_loss(logits: Tensor, kind: str, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Compute one loss for each episode. Returns (E,), float32 or float64.

    logits: (E, n, K); labels: (E, n) for "cross_entropy".
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (E, n, K)
    if kind == "mean":
        return prediction_entropy(exact).mean(dim=-1)  # (E,)
    if kind == "marginal":
        # The computation stays in logarithms, so that the probability of a class may underflow in every view.
        mean = exact.log_softmax(dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])  # (E, K)
        return prediction_entropy(mean)  # (E,)
    assert labels is not None
    values = cross_entropy(exact.mT, labels, reduction="none", label_smoothing=label_smoothing)  # (E, n)
    return values.mean(dim=-1)  # (E,)
