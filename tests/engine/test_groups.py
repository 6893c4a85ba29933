"""Episodes that are adapted together have the results of episodes that are adapted one after the other, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from rada_fast import adapt_episodes, use_backend
from rada_fast.bench.stages import counted_operations
from rada_fast.config.method import MASK_PENALTIES, AdapterConfig, EpisodeConfig
from rada_fast.engine import episodes as engine
from rada_fast.engine import groups
from rada_fast.engine.groups import EpisodeGroup, EpisodeRule, episode_bytes, group_sizes, most_episodes
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter
from rada_fast.ops import EpisodicOptimizer

if reason := libraries.load():
    pytest.skip(f"no compiled operators: {reason}", allow_module_level=True)

WIDTH, CLASSES, VIEWS = 32, 17, 10


def problem(episodes: int = 8, start: str = "zero", classes: int = CLASSES) -> tuple[RationalAdapter, Tensor, Tensor]:
    """Return an adapter, the views (E, V, D) and the text features (K, D)."""
    torch.manual_seed(classes)
    adapter = RationalAdapter(AdapterConfig.official(WIDTH))
    if start == "pretrained":
        for name in ("out_proj.weight", "out_proj.bias"):
            nn.init.normal_(adapter.get_parameter(name), std=0.05)
    return adapter, *(normalize(torch.randn(*shape), dim=-1) for shape in ((episodes, VIEWS, WIDTH), (classes, WIDTH)))


def one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """Let adapt_episodes call the module and PyTorch's optimisers for each episode."""
    patch.setattr(engine, "_serves_groups", lambda *_: False)


def with_the_roots_of_torch(patch: pytest.MonkeyPatch) -> None:
    """Let Adam take its square roots from PyTorch, whose last bit may be another one; see EpisodicOptimizer."""
    patch.setattr(groups, "EpisodicOptimizer", partial(EpisodicOptimizer, torch_roots=True))


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "marginal": {"loss": "marginal", "selection": 0.4},
    "adam": {"optimizer": "adam", "selection": 0.3},
    "sgd": {"optimizer": "sgd", "lr": 0.02},
    "no-decay": {"weight_decay": 0.0},
    "no-penalty": {"penalty_weight": 0.0, "loss": "marginal", "selection": 1.0},
    "no-steps": {"steps": 0},
    **{name: {"penalty": name, "penalty_weight": 0.7, "selection": 0.2} for name in MASK_PENALTIES},
}


@pytest.mark.parametrize("start", ["zero", "pretrained"])
@pytest.mark.parametrize("name", CASES)
def test_groups_have_the_results_of_single_episodes(name: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EpisodeConfig(**CASES[name])
    adapter, views, text = problem(start=start)
    with_the_roots_of_torch(monkeypatch)
    together = adapt_episodes(adapter, views, text, 30.0, config)
    for most in (1, 3):
        monkeypatch.setattr(groups, "MOST_EPISODES", most)
        assert torch.equal(adapt_episodes(adapter, views, text, 30.0, config), together)
    order = [6, 0, 5, 2, 1, 7, 4]
    assert torch.equal(adapt_episodes(adapter, views[order], text, 30.0, config), together[order])
    one_after_the_other(monkeypatch)
    assert torch.equal(adapt_episodes(adapter, views, text, 30.0, config), together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [("image",), ("text", "rational")])
@pytest.mark.parametrize("scale", [30.0, torch.tensor(30.0)], ids=["number", "tensor"])
def test_low_precision_and_other_queries_have_the_same_results(
    dtype: torch.dtype, queries: tuple[Any, ...], scale: float | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, views, text = problem(episodes=3)
    adapter = RationalAdapter(AdapterConfig.paper(WIDTH, queries=queries, bias=True)).to(dtype)
    nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.2)
    with_the_roots_of_torch(monkeypatch)
    together = adapt_episodes(adapter, views.to(dtype), text.to(dtype), scale)
    one_after_the_other(monkeypatch)
    assert torch.equal(adapt_episodes(adapter, views.to(dtype), text.to(dtype), scale), together)


@pytest.mark.parametrize("frozen", ["out_proj.weight", "k_proj.bias", "v_proj.weight"])
@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_frozen_parameters_stay_as_they_are(frozen: str, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, views, text = problem(episodes=3, start=start)
    adapter.get_parameter(frozen).requires_grad_(False)
    with_the_roots_of_torch(monkeypatch)
    together = adapt_episodes(adapter, views, text, 30.0)
    one_after_the_other(monkeypatch)
    assert torch.equal(adapt_episodes(adapter, views, text, 30.0), together)


def test_from_a_zero_output_projection_the_first_step_takes_its_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This leaves out work and changes no bit: a full first step has the same results."""
    # Scaled projections are left out here, because they may differ by roundings.
    monkeypatch.setattr(groups, "decay_without_gradient", lambda _: None)
    wanted: list[set[str]] = []
    original = groups.EpisodeGroup._gradients

    def noted(self: groups.EpisodeGroup, *given: Any, **named: Any) -> dict[str, Tensor]:
        wanted.append(set(given[-1]))
        return original(self, *given, **named)

    monkeypatch.setattr(groups.EpisodeGroup, "_gradients", noted)
    adapter, views, text = problem()
    fast = adapt_episodes(adapter, views, text, 30.0)
    everything = {name for name, _ in adapter.named_parameters()}
    assert wanted == [{"out_proj.weight", "out_proj.bias"}, everything, everything]

    wanted.clear()
    monkeypatch.setattr(RationalAdapter, "is_zero_shot", lambda _: False)
    assert torch.equal(adapt_episodes(adapter, views, text, 30.0), fast)
    assert wanted == [everything] * 3
    # A pretrained adapter has no such saving.
    monkeypatch.undo()
    monkeypatch.setattr(groups.EpisodeGroup, "_gradients", noted)
    wanted.clear()
    adapt_episodes(problem(start="pretrained")[0], views, text, 30.0)
    assert wanted == [everything] * 3


REUSES: list[tuple[str, dict[str, Any], str | None, bool]] = [
    ("zero", {}, None, True),
    ("zero", {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.5}, None, True),
    ("zero", {"weight_decay": 0.0}, "k_proj.bias", True),
    # Adam adds weight decay to a gradient, and what is frozen does not decay.
    ("zero", {"optimizer": "adam"}, None, False),
    ("zero", {}, "k_proj.bias", False),
    ("pretrained", {}, None, False),
]


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "one-by-one"])
@pytest.mark.parametrize(("start", "options", "frozen", "reuses"), REUSES)
def test_the_second_step_scales_the_projections_of_the_first(
    start: str,
    options: dict[str, Any],
    frozen: str | None,
    reuses: bool,
    grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter, views, text = problem(episodes=2, start=start)
    if frozen:
        adapter.get_parameter(frozen).requires_grad_(False)
    module = groups if grouped else engine
    scales: list[float | None] = []
    original = module.rational_adapter

    def noted(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            scales.append(None if named["projected"] is None else named["projected"].scale)
        return original(*given, **named)

    monkeypatch.setattr(module, "rational_adapter", noted)
    if not grouped:
        one_after_the_other(monkeypatch)
    config = EpisodeConfig(**options)
    adapt_episodes(adapter, views, text, 30.0, config)
    factor = 1.0 if config.weight_decay == 0 else 1 - config.lr * config.weight_decay
    assert scales == [None, factor if reuses else None, None] * (1 if grouped else 2)


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_scaled_projections_have_the_results_of_float64(
    decay: float, backend: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, views, text = problem(episodes=2)
    config = EpisodeConfig(optimizer="sgd", lr=0.02, weight_decay=decay, steps=steps)
    with use_backend(backend):
        fast = adapt_episodes(adapter, views, text, 30.0, config)
    monkeypatch.setattr(engine, "decay_without_gradient", lambda _: None)
    with use_backend("reference"):
        exact = adapt_episodes(adapter.double(), views.double(), text.double(), 30.0, config)
    torch.testing.assert_close(fast, exact.float(), rtol=0, atol=1e-4)
    assert (exact - exact[:, :1]).abs().max() > 1


def test_the_second_step_of_the_reference_computes_three_products_less(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, views, text = problem(episodes=1)
    config = EpisodeConfig(steps=2, selection=0.3)

    def operations() -> float:
        with use_backend("reference"):
            return counted_operations(lambda: adapt_episodes(adapter, views, text, 30.0, config))

    fewer = operations()
    monkeypatch.setattr(engine, "decay_without_gradient", lambda _: None)
    rows = 3 * CLASSES  # those of the keys, the values and the rational queries of three views
    assert operations() - fewer == 2 * WIDTH**2 * (3 * rows + CLASSES + 3)


@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_the_adapter_computes_the_kept_views_and_at_the_end_the_original(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a pretrained adapter is needed to select the views; the predictions are those of all views' adapter."""
    rows: list[int] = []
    original = groups.rational_adapter

    def noted(images: Tensor, *given: Any, **named: Any) -> Any:
        rows.append(len(images))
        return original(images, *given, **named)

    monkeypatch.setattr(groups, "rational_adapter", noted)
    adapter, views, text = problem(start=start, episodes=2)
    adapt_episodes(adapter, views, text, 30.0, EpisodeConfig(selection=0.3))
    selection = [2 * VIEWS] if start == "pretrained" else []
    assert rows == [*selection, 2 * 3, 2 * 3, 2 * 3, 2]
    # Where the budget allows only one episode at a time, their views enter one after the other.
    rows.clear()
    monkeypatch.setitem(groups.BUDGETS, "cpu", 1)
    monkeypatch.setattr(engine, "most_episodes", lambda *_: 2)
    adapt_episodes(adapter, views, text, 30.0, EpisodeConfig(selection=0.3))
    assert rows == [VIEWS for _ in selection for _ in views] + [2 * 3, 2 * 3, 2 * 3, 2]


@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_a_group_returns_the_logits_of_clip_too(start: str) -> None:
    adapter, views, text = problem(start=start)
    initial = {name: value.detach() for name, value in adapter.named_parameters()}
    rule = EpisodeRule(adapter.config, EpisodeConfig(selection=0.3), torch.float32, start == "zero", tuple(initial))
    together = EpisodeGroup(initial, rule, 8)(views, text, 30.0)
    alone = EpisodeGroup(initial, rule, 1)
    for index, own in enumerate(views.split(1)):
        single = alone(own, text, 30.0)
        assert torch.equal(single.adapted[0], together.adapted[index])
        assert torch.equal(single.zero_shot[0], together.zero_shot[index])
    torch.testing.assert_close(together.zero_shot, 30.0 * views[:, 0] @ text.T, rtol=1e-5, atol=1e-5)


def test_an_image_with_nan_changes_no_other_of_its_group() -> None:
    adapter, views, text = problem()
    clean = adapt_episodes(adapter, views, text, 30.0)
    views[3] = torch.nan
    dirty = adapt_episodes(adapter, views, text, 30.0)
    assert bool(dirty[3].isnan().all())
    others = [index for index in range(len(views)) if index != 3]
    assert torch.equal(dirty[others], clean[others])


def test_progress_counts_every_episode() -> None:
    adapter, views, text = problem(episodes=5)
    counts: list[int] = []
    adapt_episodes(adapter, views, text, 30.0, on_episode=counts.append)
    assert counts == [1, 2, 3, 4, 5]


def changed(way: str) -> nn.Module:
    adapter, _, _ = problem()
    match way:
        case "hook":
            adapter.register_forward_pre_hook(lambda _, given: None)
        case "float64":
            adapter.double()
        case "layers":
            return RationalAdapter(AdapterConfig.official(WIDTH, num_layers=2))
        case "mlp":
            return RationalAdapter(AdapterConfig.official(WIDTH, mask_function="mlp"))
    return adapter


@pytest.mark.parametrize("way", ["hook", "float64", "layers", "mlp", "reference"])
def test_what_the_operators_do_not_serve_is_adapted_one_by_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, views, text = problem(episodes=2)
    adapter = changed(way)
    monkeypatch.delattr(engine, "EpisodeGroup")
    with use_backend("reference" if way == "reference" else "auto"):
        assert adapt_episodes(adapter, views, text, 30.0).shape == (2, CLASSES)


@given(count=st.integers(0, 200), most=st.integers(1, 64))
def test_groups_make_up_all_episodes_and_have_few_sizes(count: int, most: int) -> None:
    sizes = list(group_sizes(count, most))
    assert sum(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 and size <= most for size in sizes)
    assert len(set(sizes)) <= most.bit_length()


def test_a_group_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig.official(512)
    parameters = sum(value.numel() for value in RationalAdapter(config).parameters())
    rule = EpisodeRule(config, EpisodeConfig(), torch.float32, True, ())
    taken = episode_bytes(rule, 64, 200)
    assert taken == 13 * 6 * 200 * 512 * 4 + parameters * (12 + 2 * 4) + 64 * 512 * 4
    device = torch.device("cuda")
    assert most_episodes(rule, 64, 200, device) == 2**30 // taken
    # One episode is computed whatever it takes, and not more than MOST_EPISODES whatever they leave.
    monkeypatch.setitem(groups.BUDGETS, "cuda", taken - 1)
    assert most_episodes(rule, 64, 200, device) == 1
    monkeypatch.setitem(groups.BUDGETS, "cuda", 10**15)
    assert most_episodes(rule, 64, 200, device) == groups.MOST_EPISODES
