"""Methods that adapt to a picture without training anything: ZERO, MTA and VTE, on the features of its views.

All of them take unit-norm features (V, D) of the views, the original first, and text features (K, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAREST = 0.3
"""MTA takes a view's bandwidth from this share of the other views, those nearest to it (paper: 0.3)."""
AFFINITY_WEIGHT, ENTROPY_WEIGHT = 4.0, 0.2
"""The weights of MTA's affinity and entropy, the published code's lambda_q and lambda_y."""
MOST_STEPS, TOLERANCE = 5, 1e-6
"""MTA repeats each of its steps at most so often, or until it changes less (published code)."""


def most_confident(logits: Tensor, selection: float) -> Tensor:
    """Return the indices of the views of lowest prediction entropy, the lowest first.

    logits: (V, K); selection: the share of the views to keep; at least one is kept.
    """
    return by_confidence(logits)[: max(1, int(selection * len(logits)))]


def by_confidence(logits: Tensor) -> Tensor:
    """Return the indices (V,) of all views, in the order of their prediction entropy. logits: (V, K)."""
    log_probabilities = logits.log_softmax(dim=-1)  # (V, K)
    return (-(log_probabilities.exp() * log_probabilities).sum(dim=-1)).argsort(stable=True)


def zero(features: Tensor, text_features: Tensor, logit_scale: float, *, selection: float = 0.1) -> Tensor:
    """Let the confident views vote (ZERO, Farina et al., NeurIPS 2024, arXiv:2405.18330).

    The prediction is the mean of the confident views' predictions at the limit of temperature zero, where each is 1 for
    its largest logit. If several classes have most votes, the most confident of the other views that answers one of
    them decides.

    Returns (K,): the votes, and half a vote more for the answer. The paper keeps a tenth of the views; its code has
    kept three tenths since.
    """
    logits = logit_scale * features @ text_features.T  # (V, K)
    order = by_confidence(logits)
    answers = logits[order].argmax(dim=-1)  # (V,), the most confident view first
    kept = max(1, int(selection * len(logits)))
    votes = torch.bincount(answers[:kept], minlength=len(text_features)).to(logits.dtype)  # (K,)
    leads = votes == votes.max()  # (K,)
    deciding = torch.cat([answers[kept:], answers[:kept]])
    votes[deciding[leads[deciding].int().argmax()]] += 0.5
    return votes


def mean_shift(features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """Seek the mode of the views' features (MTA, Zanella and Ben Ayed, CVPR 2024, arXiv:2405.02266).

    Each view p has an inlierness y_p, and m is the mode. With the bandwidth h_p, whose square is half the mean squared
    distance to the nearest views, the kernel g_p = exp(-|f_p - m|^2 / (2 h_p^2)) and the affinity w_pq, the product of
    the predictions of two views, these are repeated in turn:

        y_p = softmax over p of (g_p + lambda_q sum_q w_pq y_q) / lambda_y
        m = sum_p y_p g_p f_p, at unit norm

    Returns the logits (K,) of the mode.
    """
    views = len(features)
    predictions = (logit_scale * features @ text_features.T).softmax(dim=-1)  # (V, K)
    affinity = predictions @ predictions.T  # (V, V)
    nearest = int(NEAREST * (views - 1))
    squares = torch.cdist(features, features).sort(dim=1).values[:, 1 : nearest + 1] ** 2
    # With three views or fewer there is no bandwidth; all views then count as near.
    doubled = squares.mean(dim=1) if nearest else torch.ones_like(features[:, 0])  # (V,), 2 h^2
    doubled = doubled.clamp(min=torch.finfo(doubled.dtype).eps)  # equal views lie at distance 0

    def kernel(mode: Tensor) -> Tensor:
        return (-(features - mode).square().sum(dim=-1) / doubled).exp()  # (V,)

    inlierness = features.new_full((views,), 1 / views)
    mode = features[0]
    for _ in range(MOST_STEPS):
        density = kernel(mode)
        for _ in range(MOST_STEPS):
            before = inlierness
            inlierness = ((density + AFFINITY_WEIGHT * affinity @ inlierness) / ENTROPY_WEIGHT).softmax(dim=0)
            if (before - inlierness).norm() < TOLERANCE:
                break
        for _ in range(MOST_STEPS):
            before = mode
            mode = (inlierness * kernel(mode)) @ features
            mode = mode / mode.norm()
            if (before - mode).norm() < TOLERANCE:
                break
    return logit_scale * mode @ text_features.T


def vision_text_ensemble(
    features: Tensor, text_features: Tensor, logit_scale: float, *, selection: float = 0.1
) -> Tensor:
    """Classify the mean feature of the confident views (VTE, Döbler et al., CVPR Workshops 2024, arXiv:2405.14977).

    text_features: those of an ensemble of prompts, by which the method gains the most.

    Returns the logits (K,).
    """
    kept = most_confident(logit_scale * features @ text_features.T, selection)
    return logit_scale * features[kept].mean(dim=0) @ text_features.T
