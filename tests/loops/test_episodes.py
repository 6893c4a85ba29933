"""Test-time episodes: independent, reset exactly, choosing views as they should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast import adapt_episodes
from rada_fast.config import AdapterConfig, TTTConfig
from rada_fast.loops.episodes import episode_loss, prediction_entropy
from rada_fast.modules import RationalAdapter
from rada_fast.ops import select_views, zero_shot_logits


def features(episodes: int, views: int, classes: int, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(episodes * 1000 + views)
    drawn = torch.randn(episodes, views, width, generator=generator), torch.randn(classes, width, generator=generator)
    return normalize(drawn[0], dim=-1), normalize(drawn[1], dim=-1)


def adapter(start: str = "zero") -> RationalAdapter:
    made = RationalAdapter(AdapterConfig.official(16))
    if start == "pretrained":
        torch.nn.init.normal_(made.get_parameter("out_proj.weight"), std=0.02)
    return made


@pytest.mark.parametrize("start", ["zero", "pretrained"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("loss", ["mean", "marginal"])
def test_an_episode_does_not_see_its_neighbours(start: str, optimizer: str, loss: str) -> None:
    config = TTTConfig(optimizer=optimizer, loss=loss)  # type: ignore[arg-type]
    views, text = features(5, 12, 7)
    start_from = adapter(start)
    together = adapt_episodes(start_from, views, text, 100.0, config)
    order = [3, 0, 4, 1, 2]
    assert torch.equal(adapt_episodes(start_from, views[order], text, 100.0, config), together[order])
    alone = torch.cat([adapt_episodes(start_from, view[None], text, 100.0, config) for view in views])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_the_adapter_is_left_as_it_was(start: str) -> None:
    start_from = adapter(start)
    before = {name: tensor.clone() for name, tensor in start_from.state_dict().items()}
    views, text = features(2, 8, 5)
    first = adapt_episodes(start_from, views, text, 100.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start_from.state_dict().items())
    assert all(parameter.grad is None for parameter in start_from.parameters())
    assert torch.equal(adapt_episodes(start_from, views, text, 100.0), first)


def test_no_steps_predict_as_the_adapter_does() -> None:
    views, text = features(3, 8, 5)
    config = TTTConfig(steps=0)
    zero = adapt_episodes(adapter(), views, text, 100.0, config)
    torch.testing.assert_close(zero, zero_shot_logits(views[:, 0], text, 100.0), rtol=1e-5, atol=1e-5)
    pretrained = adapter("pretrained")
    expected = pretrained(views[:, 0], text, 100.0)
    torch.testing.assert_close(adapt_episodes(pretrained, views, text, 100.0, config), expected, rtol=1e-4, atol=1e-4)


def test_adaptation_lowers_the_entropy_of_the_kept_views() -> None:
    views, text = features(4, 20, 6)
    # A soft scale leaves entropy to lower; all views are kept, so the original is among them.
    config = TTTConfig(selection=1.0, steps=3, penalty_weight=0.0, lr=8e-3)
    before = prediction_entropy(zero_shot_logits(views[:, 0], text, 10.0))
    after = prediction_entropy(adapt_episodes(adapter(), views, text, 10.0, config))
    assert float(after.mean()) < float(before.mean())


def test_one_step_from_zero_is_autograds_and_the_optimisers() -> None:
    """The loop against its definition, written out with torch's own pieces."""
    config = TTTConfig(steps=2, weight_decay=0.1)
    views, text = features(1, 10, 7)
    start = adapter()
    kept = views[0][prediction_entropy(100.0 * views[0] @ text.T).argsort(stable=True)[:1]]
    twin = RationalAdapter(start.config)
    twin.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits, penalty = twin(kept, text, 100.0, penalty="l2")
        probabilities = logits.softmax(-1)
        (-(probabilities * logits.log_softmax(-1)).sum(-1).mean() + penalty).backward()
        optimizer.step()
    assert torch.equal(
        adapt_episodes(start, views, text, 100.0, config)[0], twin(views[0, :1], text, 100.0)[0].detach()
    )


@given(views=st.integers(1, 9), classes=st.integers(1, 9), seed=st.integers(0, 99))
def test_losses_are_their_definitions(views: int, classes: int, seed: int) -> None:
    logits = 5 * torch.randn(views, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(episode_loss(logits, TTTConfig()), entropies.mean())
    mean = probabilities.mean(0)
    torch.testing.assert_close(episode_loss(logits, TTTConfig(loss="marginal")), -(mean * mean.log()).sum())
    assert bool((entropies <= math.log(classes) + 1e-9).all())


def test_losses_stay_finite_far_out_and_at_ties() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    for loss in ("mean", "marginal"):
        value = episode_loss(logits, TTTConfig(loss=loss))  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, logits)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


def test_views_are_chosen_by_entropy_then_by_index() -> None:
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [1.0, 0.0]])
    assert select_views(logits, 3).tolist() == [1, 2, 3]


def test_shapes_are_checked_and_nothing_is_something() -> None:
    views, text = features(1, 4, 5)
    with pytest.raises(ValueError, match=r"view_features must be \(E, V, D\) with V >= 1, got \(4, 16\)"):
        adapt_episodes(adapter(), views[0], text, 100.0)
    assert adapt_episodes(adapter(), views[:0], text, 100.0).shape == (0, 5)


def test_a_bad_image_spoils_only_itself() -> None:
    views, text = features(3, 8, 5)
    start = adapter()
    clean = adapt_episodes(start, views, text, 100.0)
    views[1] = torch.nan
    dirty = adapt_episodes(start, views, text, 100.0)
    assert bool(dirty[1].isnan().all())
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
