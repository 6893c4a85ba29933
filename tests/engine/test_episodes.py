"""Test-time episodes are independent of one another, start from the same adapter, and choose the confident views."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from rada_fast import adapt_episodes
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine.episodes import episode_loss, prediction_entropy
from rada_fast.modules import RationalAdapter
from rada_fast.ops import EpisodicOptimizer, select_views, zero_shot_logits


def features(episodes: int, views: int, classes: int, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(episodes * 1000 + views)
    drawn = torch.randn(episodes, views, width, generator=generator), torch.randn(classes, width, generator=generator)
    return normalize(drawn[0], dim=-1), normalize(drawn[1], dim=-1)


def adapter(start: str = "zero") -> RationalAdapter:
    module = RationalAdapter(AdapterConfig.official(16))
    if start == "pretrained":
        torch.nn.init.normal_(module.get_parameter("out_proj.weight"), std=0.02)
    return module


@pytest.mark.parametrize("start", ["zero", "pretrained"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("loss", ["mean", "marginal"])
def test_an_episode_does_not_depend_on_its_neighbours(start: str, optimizer: str, loss: str) -> None:
    config = EpisodeConfig(optimizer=optimizer, loss=loss)  # type: ignore[arg-type]
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


def test_without_steps_an_episode_predicts_as_the_adapter() -> None:
    views, text = features(3, 8, 5)
    config = EpisodeConfig(steps=0)
    zero = adapt_episodes(adapter(), views, text, 100.0, config)
    torch.testing.assert_close(zero, zero_shot_logits(views[:, 0], text, 100.0), rtol=1e-5, atol=1e-5)
    pretrained = adapter("pretrained")
    expected = pretrained(views[:, 0], text, 100.0)
    torch.testing.assert_close(adapt_episodes(pretrained, views, text, 100.0, config), expected, rtol=1e-4, atol=1e-4)


def test_adaptation_lowers_the_entropy_of_the_kept_views() -> None:
    views, text = features(4, 20, 6)
    # A small logit scale leaves entropy that can fall; all views are kept, so that the original is among them.
    config = EpisodeConfig(selection=1.0, steps=3, penalty_weight=0.0, lr=8e-3)
    before = prediction_entropy(zero_shot_logits(views[:, 0], text, 10.0))
    after = prediction_entropy(adapt_episodes(adapter(), views, text, 10.0, config))
    assert float(after.mean()) < float(before.mean())


def test_one_step_from_zero_equals_autograd_and_torch_optim() -> None:
    """An episode equals the same step written out with autograd and torch.optim."""
    config = EpisodeConfig(steps=2, weight_decay=0.1)
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
def test_losses_equal_their_definitions(views: int, classes: int, seed: int) -> None:
    logits = 5 * torch.randn(views, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(episode_loss(logits, EpisodeConfig()), entropies.mean())
    mean = probabilities.mean(0)
    torch.testing.assert_close(episode_loss(logits, EpisodeConfig(loss="marginal")), -(mean * mean.log()).sum())
    assert bool((entropies <= math.log(classes) + 1e-9).all())


def test_losses_stay_finite_for_large_and_tied_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    for loss in ("mean", "marginal"):
        value = episode_loss(logits, EpisodeConfig(loss=loss))  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, logits)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())


def test_views_are_chosen_by_entropy_then_by_index() -> None:
    logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [1.0, 0.0]])
    assert select_views(logits, 3).tolist() == [1, 2, 3]


def test_wrong_shapes_are_refused_and_empty_ones_served() -> None:
    views, text = features(1, 4, 5)
    with pytest.raises(ValueError, match=r"view_features must be \(E, V, D\) with V >= 1, got \(4, 16\)"):
        adapt_episodes(adapter(), views[0], text, 100.0)
    assert adapt_episodes(adapter(), views[:0], text, 100.0).shape == (0, 5)


def test_an_image_with_nan_changes_no_other() -> None:
    views, text = features(3, 8, 5)
    start = adapter()
    clean = adapt_episodes(start, views, text, 100.0)
    views[1] = torch.nan
    dirty = adapt_episodes(start, views, text, 100.0)
    assert bool(dirty[1].isnan().all())
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def config_of(optimizer: str = "adamw") -> EpisodeConfig:
    return EpisodeConfig(optimizer=optimizer, lr=1e-3, selection=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "optimizer", "start"),
    [
        (torch.float16, "adamw", "zero"),
        (torch.float16, "adam", "pretrained"),
        (torch.float16, "sgd", "zero"),
        (torch.bfloat16, "adamw", "pretrained"),
        (torch.bfloat16, "sgd", "zero"),
    ],
)
def test_low_precision_adapts_as_float32_does(dtype: torch.dtype, optimizer: str, start: str) -> None:
    views, text = features(2, 12, 7)
    half = adapter(start).to(dtype)
    # The float32 adapter has the same numbers, so that only the arithmetic of the episode differs.
    exact = RationalAdapter(half.config)
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    views, text = views.to(dtype), text.to(dtype)
    expected = adapt_episodes(exact, views.float(), text.float(), 100.0, config_of(optimizer))
    adapted = adapt_episodes(half, views, text, 100.0, config_of(optimizer))
    assert adapted.dtype == dtype
    assert bool(adapted.isfinite().all())
    error = (adapted.float() - expected).abs().max() / expected.abs().max()
    assert float(error) <= 4 * torch.finfo(dtype).eps
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}


def test_mixed_precision_is_computed_in_the_wider_type() -> None:
    views, text = features(1, 8, 5)
    start = adapter("pretrained")
    expected = adapt_episodes(start, views, text, 100.0)
    assert adapt_episodes(start, views.double(), text.double(), 100.0).dtype == torch.float64
    half = adapt_episodes(start, views.half(), text.half(), 100.0)
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_episodes_run_inside_inference_mode_as_outside(mode: type) -> None:
    views, text = features(2, 8, 5)
    start = adapter("pretrained")
    expected = adapt_episodes(start, views, text, torch.tensor(100.0))
    with mode():
        assert torch.equal(adapt_episodes(start, views, text, 100.0), expected)
        # Features, text and parameters may also be made inside the mode, as in a test loop.
        module = RationalAdapter(start.config)
        module.load_state_dict(start.state_dict())
        adapted = adapt_episodes(module, views * 1, text * 1, torch.tensor(100.0))
        assert adapt_episodes(module, views[:0], text, 100.0).shape == (0, 5)
    assert torch.equal(adapted, expected)
    assert torch.equal(adapt_episodes(module, views, text, 100.0), expected)


def test_frozen_parameters_do_not_change() -> None:
    """The result is as if the optimiser had been given only the other parameters."""
    views, text = features(1, 10, 7)
    start = adapter("pretrained")
    free = adapt_episodes(start, views, text, 100.0, config_of())
    for name in ("q_proj1", "k_proj"):
        start.get_submodule(name).requires_grad_(False)
    frozen = adapt_episodes(start, views, text, 100.0, config_of())
    assert not torch.equal(frozen, free)
    twin = RationalAdapter(start.config)
    twin.load_state_dict(start.state_dict())
    for name in ("q_proj1", "k_proj"):
        twin.get_submodule(name).requires_grad_(False)
    kept = views[0][select_views(twin(views[0], text, 100.0), 5)]
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        logits, penalty = twin(kept, text, 100.0, penalty="l2")
        (prediction_entropy(logits).mean() + penalty).backward()
        optimizer.step()
    torch.testing.assert_close(frozen[0], twin(views[0, :1], text, 100.0)[0].detach(), rtol=1e-4, atol=1e-3)
    assert torch.equal(twin.get_parameter("k_proj.weight"), start.get_parameter("k_proj.weight"))


def test_an_adapter_with_all_parameters_frozen_is_refused_unless_steps_is_0() -> None:
    views, text = features(1, 4, 5)
    start = adapter("pretrained").requires_grad_(False)
    with pytest.raises(ValueError, match="adapter must have a parameter to train, all 12 are frozen"):
        adapt_episodes(start, views, text, 100.0)
    predicted = adapt_episodes(start, views, text, 100.0, EpisodeConfig(steps=0))
    torch.testing.assert_close(predicted, start(views[:, 0], text, 100.0))


class Doubled(RationalAdapter):
    """Doubled is a subclass with a forward of its own."""

    def forward(self, *given: Any, **named: Any) -> Any:  # type: ignore[override]
        result = super().forward(*given, **named)
        return result if isinstance(result, tuple) else 2 * result


def changed(way: str) -> nn.Module:
    torch.manual_seed(3)
    module = adapter("pretrained")
    match way:
        case "tied":
            module.get_submodule("v_proj").weight = module.get_parameter("k_proj.weight")
        case "spectral-norm":
            nn.utils.parametrizations.spectral_norm(module.get_submodule("k_proj"))
        case "hook":
            module.register_forward_pre_hook(lambda _, given: (-given[0], *given[1:]))
        case "projection-hook":
            module.get_submodule("v_proj").register_forward_hook(lambda *given: 2 * given[-1])
        case "subclass":
            twin = Doubled(module.config)
            twin.load_state_dict(module.state_dict())
            return twin
        case "wrapped":
            return nn.DataParallel(module)
    return module


@pytest.mark.parametrize("way", ["tied", "spectral-norm", "hook", "projection-hook", "subclass", "wrapped"])
def test_episodes_keep_hooks_and_parametrisations_of_the_adapter(way: str) -> None:
    views, text = features(1, 8, 5)
    config = EpisodeConfig(steps=2, weight_decay=0.1)
    start = changed(way)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    result = adapt_episodes(start, views, text, 100.0, config)
    assert torch.equal(adapt_episodes(start, views, text, 100.0, config), result)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())

    twin = changed(way)
    chosen = select_views(twin(views[0], text, 100.0).detach(), 1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits, penalty = twin(views[0][chosen], text, 100.0, penalty="l2")
        (prediction_entropy(logits).mean() + penalty).backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(result[0], twin(views[0, :1], text, 100.0)[0], rtol=1e-4, atol=1e-3)


def test_an_adapter_without_values_is_refused() -> None:
    views, text = features(1, 4, 5)
    with pytest.raises(ValueError, match=r"adapter's q_proj1\.weight is on the meta device: give it values first"):
        adapt_episodes(RationalAdapter(AdapterConfig.official(16), device="meta"), views, text, 100.0)
    with pytest.raises(TypeError, match="adapter must be a RationalAdapter, or one in a wrapper, got Linear"):
        adapt_episodes(nn.Linear(2, 2), views, text, 100.0)
    with pytest.raises(TypeError, match=r"view_features must be floating point, got torch.int64"):
        adapt_episodes(adapter(), views.long(), text, 100.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_a_device_adapts_as_the_cpu_does(dtype: torch.dtype, optimizer: str, start: str) -> None:
    # The Triton kernels serve 8 heads at a width of 64; the selection of views and the loss have CUDA kernels.
    views, text = features(3, 16, 20, 64)
    cpu_adapter = RationalAdapter(AdapterConfig.official(64))
    if start == "pretrained":
        torch.nn.init.normal_(cpu_adapter.get_parameter("out_proj.weight"), std=0.02)
    cpu_adapter, views, text = cpu_adapter.to(dtype), views.to(dtype), text.to(dtype)
    exact = RationalAdapter(cpu_adapter.config).double()
    exact.load_state_dict(cpu_adapter.state_dict())
    expected = adapt_episodes(exact, views.double(), text.double(), 100.0, config_of(optimizer))
    device_adapter = RationalAdapter(cpu_adapter.config).to("cuda", dtype)
    device_adapter.load_state_dict(cpu_adapter.state_dict())
    adapted = adapt_episodes(device_adapter, views.cuda(), text.cuda(), 100.0, config_of(optimizer))
    assert adapted.is_cuda
    for _ in range(2):
        # The second call is recorded in a CUDA graph, and the third replays it.
        again = adapt_episodes(device_adapter, views.cuda(), text.cuda(), 100.0, config_of(optimizer))
        assert torch.equal(again, adapted)
    error = float((adapted.double().cpu() - expected).norm() / expected.norm())
    # AdamW's first steps follow the signs of the gradients: three of them differ by 2e-5 between two CPUs in float32.
    assert error <= (2e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps), error


@pytest.mark.gpu
def test_an_episode_on_a_device_does_not_depend_on_its_neighbours() -> None:
    views, text = (value.cuda() for value in features(4, 16, 20, 64))
    start = RationalAdapter(AdapterConfig.official(64)).cuda()
    together = adapt_episodes(start, views, text, 100.0)
    assert torch.equal(adapt_episodes(start, views[[2, 0]], text, 100.0), together[[2, 0]])


def test_wrong_arguments_are_named() -> None:
    adapter = RationalAdapter(AdapterConfig.official(16))
    views, text = torch.randn(2, 4, 16), torch.randn(5, 16)
    for wrong, message in (
        ({"view_features": [views]}, "view_features must be a tensor, got list"),
        ({"view_features": views[..., :8]}, "view_features must have the adapter's width D = 16"),
        ({"text_features": None}, "text_features must be a tensor, got NoneType"),
        ({"text_features": text.long()}, "text_features must be floating point, got torch.int64"),
        ({"view_features": views[:0], "text_features": text[:, :8]}, "text_features must have the adapter's width"),
        ({"logit_scale": "x"}, "logit_scale must be a number"),
        ({"config": {"steps": 1}}, "config must be an EpisodeConfig, got dict"),
    ):
        given: dict[str, Any] = {"view_features": views, "text_features": text, "logit_scale": 20.0}
        with pytest.raises((TypeError, ValueError), match=message):
            adapt_episodes(adapter, **(given | wrong))
    with pytest.raises(RuntimeError, match="adapt_episodes takes optimiser steps, which transforms"):
        torch.func.vmap(lambda one: adapt_episodes(adapter, one[None], text, 20.0)[0])(views)
    optimizer = EpisodicOptimizer({"weight": torch.zeros(3)}, episodes=2, name="sgd", lr=0.1)
    with pytest.raises(RuntimeError, match=r"EpisodicOptimizer.step writes into its parameters, which transforms"):
        torch.func.vmap(lambda one: (optimizer.step({"weight": one}), one)[1])(torch.ones(4, 2, 3))
    with pytest.raises(TypeError, match=r"gradients\['weight'\] must be dense"):
        optimizer.step({"weight": torch.ones(2, 3).to_sparse()})
