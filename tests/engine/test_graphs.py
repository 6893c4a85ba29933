"""Groups of episodes that are replayed from CUDA graphs have the results of those whose launches are all made.

Without a device, a stand-in that calls what would be recorded shows what is recorded when, and what a replay reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from rada_fast import adapt_episodes
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine import episodes as engine
from rada_fast.engine import graphs, groups
from rada_fast.engine.graphs import GRAPHS, KEPT_GRAPHS, GroupInputs, usable
from rada_fast.engine.groups import EpisodeGroup, EpisodeRule, GroupLogits
from rada_fast.extension import libraries
from rada_fast.modules import RationalAdapter

WIDTH, CLASSES, VIEWS = 64, 20, 16
Problem = tuple[RationalAdapter, Tensor, Tensor]


def problem(episodes: int, start: str = "zero", classes: int = CLASSES, device: str = "cpu") -> Problem:
    """Return an adapter, the views (E, V, D) and the text features (K, D)."""
    torch.manual_seed(episodes)
    adapter = RationalAdapter(AdapterConfig.official(WIDTH))
    if start == "pretrained":
        nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.02)
    drawn = (torch.randn(*shape, WIDTH) for shape in ((episodes, VIEWS), (classes,)))
    views, text = (normalize(value, dim=-1).to(device) for value in drawn)
    return adapter.to(device), views, text


class StandIn:
    """StandIn takes a recording's place: a replay makes the call again, and writes into the same result."""

    made: list[StandIn]

    def __init__(self, call: Callable[[], GroupLogits], device: torch.device) -> None:
        result = GroupLogits(*(value.clone() for value in call()))
        self.call, self.result, self.replays, self.waited = call, result, 0, False
        self.made.append(self)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        yield

    def replay(self) -> GroupLogits:
        self.replays += 1
        for kept, value in zip(self.result, self.call(), strict=True):
            kept.copy_(value)
        return self.result

    def wait(self) -> None:
        self.waited = True


@pytest.fixture(autouse=True)
def _no_graphs_left() -> Iterator[None]:
    GRAPHS.clear()
    yield
    GRAPHS.clear()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Return a list of all recordings, which stand-ins make on the CPU."""
    if reason := libraries.load():
        pytest.skip(f"no compiled operators: {reason}")
    made: list[StandIn] = []
    monkeypatch.setattr(StandIn, "made", made, raising=False)
    monkeypatch.setattr(graphs, "Recording", StandIn)
    monkeypatch.setattr(engine, "usable", lambda _: True)
    return made


SCALE = torch.tensor(30.0)


def test_the_second_group_of_a_kind_is_recorded(recordings: list[StandIn]) -> None:
    adapter, views, text = problem(4)
    first = adapt_episodes(adapter, views, text, SCALE)
    assert not recordings
    for replays in (1, 2):
        assert torch.equal(adapt_episodes(adapter, views, text, SCALE), first)
        assert [one.replays for one in recordings] == [replays]


@pytest.mark.parametrize("start", ["zero", "pretrained"])
def test_a_replay_reads_the_present_inputs(start: str, recordings: list[StandIn]) -> None:
    adapter, views, text = problem(4, start)
    for _ in range(2):
        adapt_episodes(adapter, views, text, SCALE)
    other, more_views, more_text = problem(4, start)[0], views.flip(0), text.flip(0)
    nn.init.normal_(other.get_parameter("k_proj.weight"), std=0.3)
    found = adapt_episodes(other, more_views, more_text, SCALE / 2)
    assert [one.replays for one in recordings] == [2]
    GRAPHS.clear()
    assert torch.equal(adapt_episodes(other, more_views, more_text, SCALE / 2), found)
    # The results of earlier replays are not those of the last one.
    again = adapt_episodes(other, more_views, more_text, SCALE / 2)
    assert torch.equal(again, found)
    adapt_episodes(adapter, views, text, SCALE)
    assert torch.equal(again, found)


def test_another_kind_of_group_is_recorded_anew(recordings: list[StandIn]) -> None:
    adapter, views, text = problem(4)
    frozen = problem(4)[0]
    frozen.get_parameter("k_proj.weight").requires_grad_(False)
    calls: list[tuple[Any, ...]] = [
        (adapter, views, text, SCALE),
        (adapter, views[:2], text, SCALE),
        (adapter, views[:, :12], text, SCALE),
        (adapter, views, text[:9], SCALE),
        (adapter, views, text, SCALE, EpisodeConfig(lr=2e-3)),
        (frozen, views, text, SCALE),
        (problem(4, "pretrained")[0], views, text, SCALE),
        (adapter.bfloat16(), views.bfloat16(), text.bfloat16(), SCALE),
    ]
    for at, call in enumerate(calls, start=1):
        results = [adapt_episodes(*call) for _ in range(3)]
        assert all(torch.equal(result, results[0]) for result in results)
        assert [one.replays for one in recordings] == [2] * at
        # The graphs that were used the longest ago were dropped, after the device had finished with them.
        assert [one.waited for one in recordings] == [index < at - KEPT_GRAPHS for index in range(at)]


def test_settings_of_products_and_tiles_make_another_kind(
    recordings: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, matmul = problem(1), torch.backends.cuda.matmul

    def adapt_twice() -> None:
        for _ in range(2):
            adapt_episodes(*call, SCALE)

    adapt_twice()
    monkeypatch.setenv("RADA_FAST_FLOAT32", "tf32")
    adapt_twice()
    assert len(recordings) == 2
    monkeypatch.setenv("RADA_FAST_TILES", "table")
    adapt_twice()
    assert len(recordings) == 3
    for made, number in ((4, "bf16"), (5, "fp16")):
        name = f"allow_{number}_reduced_precision_reduction"
        before = getattr(matmul, name)
        setattr(matmul, name, not before)
        try:
            adapt_twice()
        finally:
            setattr(matmul, name, before)
        assert len(recordings) == made


def test_a_multiplier_of_another_type_is_not_rounded_to_the_recorded_one(recordings: list[StandIn]) -> None:
    call = problem(1)
    for _ in range(2):
        adapt_episodes(*call, SCALE)
    for _ in range(2):
        adapt_episodes(*call, SCALE.double() / 3)
    assert len(recordings) == 2


def test_the_graph_that_was_used_the_longest_ago_is_dropped(recordings: list[StandIn]) -> None:
    adapter, views, text = problem(1)

    def adapt(classes: int) -> None:
        adapt_episodes(adapter, views, text[:classes], SCALE)

    for classes in range(1, KEPT_GRAPHS + 1):
        adapt(classes)
        adapt(classes)
    adapt(1)
    for _ in range(2):
        adapt(KEPT_GRAPHS + 1)
    # The first graph was made before the second, but was used after it.
    assert [one.waited for one in recordings] == [False, True] + [False] * (KEPT_GRAPHS - 1)


def test_the_rest_of_a_call_is_divided_into_groups_of_known_kinds(
    recordings: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST_EPISODES", 4)
    adapter, views, text = problem(15)
    expected = adapt_episodes(adapter, views, text, SCALE)
    assert torch.equal(adapt_episodes(adapter, views, text, SCALE), expected)
    assert [one.replays for one in recordings] == [2 + 3, 1, 1], "groups of 4, 4, 4, 2 and 1 episodes"


def test_what_cannot_be_recorded_is_computed_without(
    recordings: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def fail(*_: Any) -> None:
        nonlocal tries
        tries += 1
        raise RuntimeError("no memory for a graph")

    monkeypatch.setattr(graphs, "Recording", fail)
    adapter, views, text = problem(3)
    expected = adapt_episodes(adapter, views, text, SCALE)
    with pytest.warns(RuntimeWarning, match="could not be recorded in a CUDA graph, .* no memory for a graph"):
        assert torch.equal(adapt_episodes(adapter, views, text, SCALE), expected)
    assert torch.equal(adapt_episodes(adapter, views, text, SCALE), expected)
    assert tries == 2, "one for two episodes and one for the third"


@contextmanager
def switched(switch: Callable[[bool], None]) -> Iterator[None]:
    switch(True)
    try:
        yield
    finally:
        switch(False)


LOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "hooks": torch.autograd.graph.save_on_cpu,
    "dispatch-mode": lambda: FlopCounterMode(display=False),
    "autocast": lambda: switched(partial(torch.set_autocast_enabled, "cuda")),
    "anomalies": lambda: switched(torch.autograd.set_detect_anomaly),
    "determinism": lambda: switched(torch.use_deterministic_algorithms),
}


@pytest.mark.parametrize("look", LOOKS)
def test_graphs_are_not_used_where_something_looks_at_the_launches(look: str) -> None:
    device = torch.device("cuda")
    assert usable(device)
    with LOOKS[look]():
        assert not usable(device)
    assert usable(device)


def test_graphs_are_for_devices_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not usable(torch.device("cpu"))
    monkeypatch.setenv("RADA_FAST_GRAPHS", "0")
    assert not usable(torch.device("cuda"))


def without_graphs(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Tensor:
    """Return what adapt_episodes gives where all its launches are made."""
    with monkeypatch.context() as patch:
        patch.setenv("RADA_FAST_GRAPHS", "0")
        return adapt_episodes(*arguments)


def recorded() -> int:
    """Return how many graphs are kept."""
    return len(GRAPHS._graphs)


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "marginal": {"loss": "marginal", "selection": 0.4, "optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "lr": 0.02, "penalty": "l1"},
    "linf": {"penalty": "linf", "weight_decay": 0.0},
    "no-penalty": {"penalty_weight": 0.0},
    "no-steps": {"steps": 0},
}


# Every type and start once, and every other configuration once: kernels are compiled for each of them.
CHOSEN = [("paper", dtype, start) for dtype in ("float32", "bfloat16", "float16") for start in ("zero", "pretrained")]
CHOSEN += [("marginal", "bfloat16", "zero"), ("sgd", "float32", "pretrained"), ("linf", "float32", "zero")]
CHOSEN += [("no-penalty", "bfloat16", "pretrained"), ("no-steps", "float32", "zero")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "type_name", "start"), CHOSEN)
def test_a_graph_has_the_results_of_its_launches(
    name: str, type_name: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven episodes make groups of 4, 2 and 1. Their results are also those of each episode by itself."""
    monkeypatch.setattr(groups, "MOST_EPISODES", 4)
    config = EpisodeConfig(**CASES[name])
    adapter, views, text = problem(7, start, device="cuda")
    dtype = getattr(torch, type_name)
    adapter, views, text = adapter.to(dtype), views.to(dtype), text.to(dtype)

    def call() -> Tensor:
        return adapt_episodes(adapter, views, text, 30.0, config)

    expected = without_graphs(monkeypatch, adapter, views, text, 30.0, config)
    assert recorded() == 0
    for graphs_kept in (0, 3, 3):
        assert torch.equal(call(), expected)
        assert recorded() == graphs_kept
    monkeypatch.setattr(groups, "MOST_EPISODES", 1)
    assert torch.equal(call(), expected)


@pytest.mark.gpu
def test_a_graph_reads_the_present_adapter_and_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, views, text = problem(4, "pretrained", device="cuda")
    for _ in range(3):
        adapt_episodes(adapter, views, text, 30.0)
    seen = [adapt_episodes(adapter, views, text, 30.0)]
    for change in ("parameters", "multiplier", "views", "text"):
        scale = 30.0
        match change:
            case "parameters":
                with torch.no_grad():
                    adapter.get_parameter("v_proj.weight").mul_(1.5)
            case "multiplier":
                scale = 50.0
            case "views":
                views = views.flip(0)
            case "text":
                text = text.flip(0)
        found = adapt_episodes(adapter, views, text, scale)
        assert recorded() == 1
        assert torch.equal(found, without_graphs(monkeypatch, adapter, views, text, scale))
        assert not any(torch.equal(found, earlier) for earlier in seen)
        seen.append(found)


@pytest.mark.gpu
def test_a_graph_works_in_inference_mode_on_other_streams_and_in_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, views, text = problem(4, "pretrained", device="cuda")
    expected = without_graphs(monkeypatch, adapter, views, text, 30.0)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(adapt_episodes(adapter, views * 1, text * 1, 30.0), expected)
    assert recorded() == 1
    with torch.no_grad():
        assert torch.equal(adapt_episodes(nn.DataParallel(adapter), views, text, 30.0), expected)
    other = views.flip(0)
    flipped = without_graphs(monkeypatch, adapter, other, text, 30.0)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for turn in range(6):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(adapt_episodes(adapter, (views, other)[turn % 2], text, 30.0))
    torch.cuda.synchronize()
    assert recorded() == 1
    for turn, result in enumerate(results):
        assert torch.equal(result, (expected, flipped)[turn % 2]), turn


@pytest.mark.gpu
def test_a_replay_allocates_its_result_alone_and_does_not_wait() -> None:
    adapter, views, text = problem(4, device="cuda")
    initial = {name: value.detach() for name, value in adapter.named_parameters()}
    rule = EpisodeRule(adapter.config, EpisodeConfig(), torch.float32, True, tuple(initial))
    inputs = GroupInputs(views, text, torch.full((), 30.0, device="cuda"), initial)
    assert GRAPHS.adapt(inputs, rule) is None
    expected = EpisodeGroup(initial, rule, 4)(*inputs[:3])
    kept = GRAPHS.adapt(inputs, rule)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = GRAPHS.adapt(inputs, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] <= before + 1
    assert kept is not None
    assert again is not None
    for values in zip(expected, kept, again, strict=True):
        assert torch.equal(values[1], values[0])
        assert torch.equal(values[2], values[0])
