"""RAda as published: in the loop of test-time prompt tuning, as a careful user would write it, and in training.

All of it has the published adapter's arithmetic, autograd and PyTorch's own optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from rada_fast.bench.baselines.training_free import most_confident
from rada_fast.config.commands import EFTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter

Encode = Callable[[Tensor], Tensor]
"""A function from views (N, 3, S, S) to features (N, D) of unit norm."""


class PublishedEpisodes:
    """Adapt to each picture as published code does: RAda's adapter in the loop of test-time prompt tuning (TPT).

    Every step encodes all views and sends all of them through the adapter, and the loss is that of the confident ones,
    which the first step chooses. One adapter and one optimiser serve all pictures; their initial states are put back
    before each. The original is encoded once more for the prediction.

    adapter: the adapter with which every picture starts; text_features: T (K, D); config: the episode.
    """

    def __init__(
        self, adapter: RationalAdapter, text_features: Tensor, logit_scale: float, config: EpisodeConfig
    ) -> None:
        self._adapter = copy.deepcopy(adapter)
        self._text, self._scale, self._config = text_features, logit_scale, config
        self._optimizer = _optimizer(self._adapter, config)
        self._initial = copy.deepcopy(self._adapter.state_dict())
        self._initial_optimizer = copy.deepcopy(self._optimizer.state_dict())

    def __call__(self, views: Tensor, encode: Encode) -> Tensor:
        """Return the logits (K,) of the original. views: (V, 3, S, S), the original first."""
        self._adapter.load_state_dict(self._initial)
        self._optimizer.load_state_dict(self._initial_optimizer)
        kept: Tensor | None = None
        for _ in range(self._config.steps):
            with torch.no_grad():
                features = encode(views)
            logits, mask = _adapted(self._adapter, features, self._text, self._scale)
            if kept is None:
                kept = most_confident(logits.detach(), self._config.selection)
            self._optimizer.zero_grad()
            _loss(logits[kept], mask[kept], self._config).backward()
            self._optimizer.step()
        with torch.no_grad():
            return _adapted(self._adapter, encode(views[:1]), self._text, self._scale)[0][0]


def careful_episode(
    features: Tensor, adapter: RationalAdapter, text_features: Tensor, logit_scale: float, config: EpisodeConfig
) -> Tensor:
    """Adapt to a picture as a careful user would write it in plain PyTorch, with the same result.

    Its views were encoded once. The adapter starts with masks of 1, so the zero-shot logits choose the confident views,
    and only these enter the adapter.

    features: (V, D), the original first; adapter: an adapter whose output projection is zero; it does not change.

    Returns the logits (K,) of the original.
    """
    kept = features[most_confident(logit_scale * features @ text_features.T, config.selection)]  # (n, D)
    own = copy.deepcopy(adapter)
    optimizer = _optimizer(own, config)
    for _ in range(config.steps):
        logits, mask = _adapted(own, kept, text_features, logit_scale)
        optimizer.zero_grad()
        _loss(logits, mask, config).backward()
        optimizer.step()
    with torch.no_grad():
        return _adapted(own, features[:1], text_features, logit_scale)[0][0]


class PublishedTraining:
    """Take training iterations as the published code does: encode a batch without gradients, then train the adapter.

    text_features: T (K, D), computed once; the other arguments are those of PublishedEpisodes.
    """

    def __init__(self, adapter: RationalAdapter, text_features: Tensor, logit_scale: float) -> None:
        self._adapter, self._text, self._scale = copy.deepcopy(adapter), text_features, logit_scale
        self._optimizer = AdamW(self._adapter.parameters(), lr=EFTOptions.lr, weight_decay=EFTOptions.weight_decay)

    def __call__(self, images: Tensor, labels: Tensor, encode: Encode) -> None:
        """Take one iteration on images (B, 3, S, S) of the classes labels (B,)."""
        with torch.no_grad():
            features = encode(images)
        self._optimizer.zero_grad()
        logits, mask = _adapted(self._adapter, features, self._text, self._scale)
        penalty = (mask - 1).square().mean()
        (cross_entropy(logits, labels) + EFTOptions.penalty_weight * penalty).backward()
        self._optimizer.step()

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Compute the logits (B, K) of image features (B, D)."""
        return _adapted(self._adapter, features, self._text, self._scale)[0]


def _optimizer(adapter: RationalAdapter, config: EpisodeConfig) -> AdamW:
    """Make the optimiser of test-time training in the paper."""
    return AdamW(adapter.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def _adapted(
    adapter: RationalAdapter, features: Tensor, text_features: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the logits (B, K) and the mask (B, K, D) with the published arithmetic."""
    parameters = dict(adapter.named_parameters())
    output = rational_adapter(
        features, text_features, logit_scale, parameters, adapter.config, return_mask=True, backend="literal"
    )
    assert output.mask is not None
    return output.logits, output.mask


def _loss(logits: Tensor, mask: Tensor, config: EpisodeConfig) -> Tensor:
    """Compute the mean entropy of the predictions (Eq. 5) and the weighted mean of (M - 1)^2 (Eq. 7).

    logits: (n, K); mask: (n, K, D).
    """
    log_probabilities = logits.log_softmax(dim=-1)  # (n, K)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    return entropy + config.penalty_weight * (mask - 1).square().mean()
