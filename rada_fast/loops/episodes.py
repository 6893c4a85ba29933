"""Test-time episodes on features (RAda, arXiv:2507.15480, Sec. 4.3): one adapter per test image, adapted and forgotten.

Each episode is evaluated by itself, on shapes that depend on its own views alone: its result is the same bits whatever
its neighbours, their number or their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from rada_fast.config import OptimizerName, TTTConfig
from rada_fast.modules.rational_adapter import RationalAdapter
from rada_fast.ops import prediction_loss, rational_adapter, select_views, zero_shot_logits


def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats. logits: (..., K). Returns (...)."""
    log_probabilities = logits.log_softmax(dim=-1)  # (..., K)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def episode_loss(logits: Tensor, config: TTTConfig) -> Tensor:
    """Entropy of the kept views (Eq. 5): mean of their entropies, or entropy of their mean prediction.

    logits: (n, K). Returns a 0-dim tensor, in nats.
    """
    return prediction_loss(logits, config.loss)


def make_optimizer(
    parameters: Iterable[Tensor], name: OptimizerName, *, lr: float, weight_decay: float, momentum: float = 0.0
) -> Optimizer:
    """A fresh optimiser, its state zero: resetting an episode is making a new one. momentum: of SGD."""
    match name:
        case "adamw":
            return AdamW(parameters, lr=lr, weight_decay=weight_decay)
        case "adam":
            return Adam(parameters, lr=lr, weight_decay=weight_decay)
        case "sgd":
            return SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum)


def adapt_episode(
    adapter: RationalAdapter,
    views: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    config: TTTConfig,
    *,
    identity: bool,
) -> Tensor:
    """Adapt to one image's views and predict the original. views: (V, D), the original first. Returns (K,).

    identity: whether the adapter starts with zero output projections, every mask 1.
    """
    parameters = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    optimizer = make_optimizer(parameters.values(), config.optimizer, lr=config.lr, weight_decay=config.weight_decay)

    with torch.no_grad():
        # With every mask 1 the views are chosen before any adapter work.
        if identity:
            logits = zero_shot_logits(views, text_features, logit_scale)  # (V, K)
        else:
            logits = rational_adapter(views, text_features, logit_scale, parameters, adapter.config).logits
    kept = views[select_views(logits, config.num_selected(len(views)))]  # (n, D)

    for _ in range(config.steps):
        optimizer.zero_grad()
        output = rational_adapter(
            kept,
            text_features,
            logit_scale,
            parameters,
            adapter.config,
            penalty=config.penalty if config.penalty_weight else None,
        )
        loss = episode_loss(output.logits, config)
        if output.penalty is not None:
            loss = loss + config.penalty_weight * output.penalty
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        return rational_adapter(views[:1], text_features, logit_scale, parameters, adapter.config).logits[0]


def adapt_episodes(
    adapter: RationalAdapter,
    view_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    config: TTTConfig | None = None,
    *,
    on_episode: Callable[[int], None] | None = None,
) -> Tensor:
    """Adapt E episodes, each with its own copy of the adapter, and predict each original view.

    For every episode: keep the int(selection * V) views of lowest prediction entropy once, take the optimiser's steps
    on the entropy of their predictions (Eq. 5) plus the weighted mask penalty (Eq. 7), predict view 0 with the adapted
    copy. The adapter itself is never changed; no state passes from one episode to the next.

    adapter: where every episode starts; view_features: (E, V, D), unit norm, the original view first;
    text_features: (K, D), unit norm; logit_scale: the multiplier s; config: None takes the paper's.
    on_episode: called with the number of finished episodes, for progress.

    Returns logits (E, K). Raises ValueError naming the argument.
    """
    if view_features.ndim != 3 or view_features.shape[1] == 0:
        raise ValueError(f"view_features must be (E, V, D) with V >= 1, got {tuple(view_features.shape)}")
    config = config or TTTConfig()
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    views, text = view_features.detach(), text_features.detach()
    identity = adapter.is_identity()
    results = []
    with torch.enable_grad():
        for index, episode in enumerate(views):
            results.append(adapt_episode(adapter, episode, text, scale, config, identity=identity))
            if on_episode is not None:
                on_episode(index + 1)
    if not results:
        return views.new_empty((0, len(text)))
    return torch.stack(results)
