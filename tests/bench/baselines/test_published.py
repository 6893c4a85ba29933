"""RAda as published and as a careful user writes it are the episodes and the steps of this package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast.bench.baselines.published import PublishedEpisodes, PublishedTraining, careful_episode
from rada_fast.config.commands import EFTOptions
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine.episodes import adapt_episodes
from rada_fast.modules import RationalAdapter
from rada_fast.ops import use_backend

SCALE = 30.0
CONFIG = EpisodeConfig(lr=2e-2, penalty_weight=0.5)


@pytest.fixture
def adapter() -> RationalAdapter:
    torch.manual_seed(0)
    return RationalAdapter(AdapterConfig.official(16)).double()


def drawn(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


@pytest.mark.parametrize("views", [1, 25])
def test_both_are_the_episodes_of_this_package(adapter: RationalAdapter, views: int) -> None:
    text = drawn(7, 16, seed=1)
    pictures = [drawn(views, 16, seed=seed) for seed in (2, 3, 2)]
    with use_backend("reference"):
        expected = adapt_episodes(adapter, torch.stack(pictures), text, SCALE, CONFIG)
    assert not torch.allclose(expected[0], SCALE * pictures[0][0] @ text.T, rtol=1e-2)
    weights = copy.deepcopy(adapter.state_dict())
    published = PublishedEpisodes(adapter, text, SCALE, CONFIG)
    seen: list[int] = []

    def encode(views: Tensor) -> Tensor:
        seen.append(len(views))
        return views  # the views of this test are their own features

    for features, answer in zip(pictures, expected, strict=True):
        torch.testing.assert_close(published(features, encode), answer)
        torch.testing.assert_close(careful_episode(features, adapter, text, SCALE, CONFIG), answer)
    # The published loop encodes all views in each of the three steps, and the original once more.
    assert seen == 3 * [views, views, views, 1]
    assert all(torch.equal(value, weights[name]) for name, value in adapter.state_dict().items())


def test_training_is_the_published_step(adapter: RationalAdapter) -> None:
    text, images, labels = drawn(5, 16, seed=1), drawn(2, 16, seed=2), torch.tensor([3, 0])
    training = PublishedTraining(adapter, text, SCALE)
    own = copy.deepcopy(adapter)
    optimizer = torch.optim.AdamW(own.parameters(), lr=EFTOptions.lr, weight_decay=EFTOptions.weight_decay)
    for _ in range(2):
        training(images, labels, lambda views: views)
        optimizer.zero_grad()
        with use_backend("reference"):
            logits, penalty = own(images, text, SCALE, penalty="l2")
        (cross_entropy(logits, labels) + EFTOptions.penalty_weight * penalty).backward()
        optimizer.step()
    with torch.no_grad(), use_backend("reference"):
        torch.testing.assert_close(training.predict(images), own(images, text, SCALE), rtol=1e-5, atol=1e-6)
