"""Stages are timed in turn, and compared with what the machine did in the same rounds."""

from __future__ import annotations

import pytest
import torch

from rada_fast.bench.costs import Work
from rada_fast.bench.stages import MEASURED, SIZES, Ratio, Setting, Stage, counted_operations, figures_of, measure
from rada_fast.bench.timing import Interleaved, Memory, Times, interleaved
from rada_fast.config.measuring import MeasuringOptions


def test_figures_follow_from_times_and_limits() -> None:
    stages = tuple(
        Stage(name=name, inside=f"what {name} does", call=lambda: None, pictures=4, work=work, operations=operations)
        for name, work, operations in (
            ("encode", (Work(8e9, 1e6),), 8e9),
            ("adapt", (Work(1e9, 1e6), Work(0.0, 2e9)), None),
            ("all", (Work(8e9, 1e6), Work(1e9, 1e6), Work(0.0, 2e9)), None),
        )
    )
    setting = Setting(
        name="two",
        sizes={"views": 4},
        stages=stages,
        whole="all",
        ratios=(
            Ratio("overhead", "all", ("encode",), "why"),
            Ratio("loop", "all", ("encode", "adapt"), ""),
        ),
    )
    times = {"encode": Times((100, 120, 200)), "adapt": Times((40, 30, 50)), "all": Times((160, 150, 400))}
    rates = {("float32", "PyTorch"): 60e9, ("float32", "oneDNN"): 100e9, ("bfloat16", "PyTorch"): 900e9}
    memory = {"encode": Memory(100, 10), "adapt": None, "all": Memory(120, 20)}
    lines = figures_of(setting, Interleaved(times, memory, rates, 100e9))
    assert [(line["kind"], line["name"]) for line in lines] == [
        ("stage", "encode"), ("stage", "adapt"), ("stage", "all"), ("ratio", "overhead"), ("ratio", "loop"),
        ("limit", "float32 products by PyTorch"), ("limit", "float32 products by oneDNN"),
        ("limit", "bfloat16 products by PyTorch"), ("limit", "bandwidth"),
    ]  # fmt: skip
    assert all(set(line) == {"setting", *SIZES, *MEASURED} for line in lines)
    encode, adapt, whole, ratio, loop, _, rate, _, bandwidth = lines
    assert (encode["best"], encode["median"], encode["spread"], encode["rounds"]) == (100, 120, 50, 3)
    assert encode["share"] == 120 / 160
    assert encode["pictures_per_second"] == pytest.approx(4 / 0.120)
    assert (encode["multiply_adds_per_picture"], encode["operations_per_picture"]) == (1e9, 2e9)
    assert (encode["counted_multiply_adds_per_picture"], encode["counted_operations_per_picture"]) == (1e9, 2e9)
    assert (encode["floor_ms"], encode["gap"], encode["share_of_peak"]) == pytest.approx((80, 1.25, 0.8))
    # Where the optimiser waits for the gradients, the floors of both add up.
    assert adapt["floor_ms"] == pytest.approx(10 + 20)
    assert adapt["share_of_bandwidth"] == pytest.approx(2.001e9 / 100e9 / 0.030)
    assert adapt["counted_operations_per_picture"] is None
    assert (adapt["peak_mib"], whole["peak_mib"], whole["extra_mib"], whole["share"]) == (None, 120, 20, 1)
    # The best ratio is that of the best times; the median is that of the ratios of the rounds.
    assert (ratio["best"], ratio["median"], ratio["unit"]) == (1.5, 1.6, "1")
    assert (loop["best"], loop["median"]) == (150 / 130, 160 / 140)
    assert (rate["best"], rate["unit"], bandwidth["best"], bandwidth["unit"]) == (100, "GFLOP/s", 100, "GB/s")


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measured = interleaved(calls, "cpu", seconds=0.0, repeats=3)  # type: ignore[arg-type]
    assert all(len(times.rounds) == 3 for times in measured.times.values())
    # A fast call is repeated within a round; the calls come after each other in each round.
    changes = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert "".join(changes).endswith("abc" * 3)
    assert len(interleaved(calls, "cpu", seconds=0.0).times["a"].rounds) == 3  # type: ignore[arg-type]


def test_memory_of_a_stage_is_its_own() -> None:
    sizes = {"small": 2**20, "large": 2**26}
    stages = tuple(
        Stage(name=name, inside=name, call=lambda size=size: torch.ones(size // 4), pictures=1)  # type: ignore[misc]
        for name, size in sizes.items()
    )
    small, large, *_ = measure(
        Setting(name="", sizes={}, stages=stages), "cpu", MeasuringOptions(seconds=0.01, repeats=2)
    )
    if small["peak_mib"] is None:
        pytest.skip("this system does not tell the peak of memory")
    assert large["extra_mib"] == pytest.approx(64, abs=4)
    assert small["extra_mib"] < 8
    assert large["peak_mib"] > large["extra_mib"]


def test_the_counter_sees_attention_on_the_cpu() -> None:
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    tokens = torch.zeros(1, 5, 16)
    with torch.no_grad():
        counted = counted_operations(lambda: layer(tokens, tokens, tokens, need_weights=False))
    assert counted == 2 * (5 * 4 * 16**2 + 2 * 5**2 * 16)
