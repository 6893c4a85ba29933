"""The harness of the benchmarks times the CPU, and a device that these tests simulate with the host's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_rational_adapter, table, timing
from benchmarks.timing import Case, Provider
from rada_fast.bench import timing as bench_timing
from rada_fast.bench.adapter import Problem

ONES = torch.ones(4)
FAKE_DEVICE = "cpu:0"
"""Tensors on this device are on the CPU, but the harness treats it as another device."""


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def sleep_cycles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Simulate a device with a million cycles per millisecond. Returns a list of the cycles of every sleep."""
    cycles: list[int] = []

    def sleep(count: int) -> None:
        cycles.append(count)
        time.sleep(min(count, 2_000_000) * 1e-9)

    fakes: dict[str, Any] = {
        "Event": Event, "_sleep": sleep, "synchronize": lambda: None, "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=2**10),
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(bench_timing, "DEVICE_PRODUCT_SIZE", 64)
    monkeypatch.setattr(bench_timing, "DEVICE_COPIED_BYTES", 2**12)
    cached = (bench_timing._flusher, bench_timing._cycles_per_second, bench_timing.product_rate, bench_timing.bandwidth)
    for function in cached:
        function.cache_clear()
    yield cycles
    for function in cached:
        function.cache_clear()


def case_of(device: str = "cpu", baseline: str = "plain", **providers: Provider) -> Case:
    return Case(
        name="ones", device=device, providers=providers, baseline=baseline, expected=ONES, least_bytes=ONES.nbytes
    )


def test_the_device_is_kept_busy_while_the_host_queues(sleep_cycles: list[int]) -> None:
    assert bench_timing.device_ms(lambda: time.sleep(2e-3), 4.0, FAKE_DEVICE) >= 2.0
    # The device sleeps half as long again as the host needs, by the clock that was measured.
    assert sleep_cycles[-1] >= 1.5e-3 * 4.0 * bench_timing._cycles_per_second()
    host, wall = bench_timing.host_and_wall_ms(lambda: time.sleep(1e-3))
    assert 1.0 <= host <= wall


def test_bursts_on_a_device_are_timed_by_events(sleep_cycles: list[int]) -> None:
    measured = bench_timing.interleaved(
        {"slow": lambda: time.sleep(2e-3), "fast": lambda: None}, FAKE_DEVICE, seconds=0.0, burst=2, dtypes=["float32"]
    )
    assert measured.times["slow"].best >= 2.0 > measured.times["fast"].best
    assert measured.memory["slow"] == (3.0, 2.0)
    assert measured.product_rate("float32") > 0
    assert measured.bandwidth > 0


def test_every_provider_is_compared_with_the_floor(sleep_cycles: list[int]) -> None:
    problem = Problem(2, 5, "official", "float32", True, width=64, device=FAKE_DEVICE)
    case = bench_rational_adapter.case_of(problem, ["literal", "reference"])
    rows = timing.measure(case)
    assert [row["provider"] for row in rows] == ["literal", "reference"]
    for row in rows:
        assert row["classes"] == 5
        assert row["host_ms"] <= row["wall_ms"]
        assert row["share"] == pytest.approx(row["floor_ms"] / row["best_ms"])
        assert row["extra_mib"] == 2.0
    seconds = (
        case.operations / bench_timing.product_rate("float32", FAKE_DEVICE),
        case.least_bytes / bench_timing.bandwidth(FAKE_DEVICE),
    )
    assert rows[0]["floor_ms"] == pytest.approx(1e3 * max(seconds))
    assert "host ms" in "\n".join(table.figures(rows))


def test_providers_are_compared_with_the_best_of_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)

    def slow() -> torch.Tensor:
        time.sleep(2e-3)
        return ONES.clone()

    providers = {"plain": Provider(slow, 0), "near": Provider(lambda: ONES + 1e-6, 1e-5)}
    plain, near = timing.measure(case_of(**providers))
    assert plain["ratio"] == 1.0
    assert near["ratio"] == plain["best_ms"] / near["best_ms"]
    assert plain["rounds"] == near["rounds"] == bench_timing.MIN_ROUNDS
    assert plain["best_ms"] <= plain["median_ms"]
    assert plain["gb_per_s"] == pytest.approx(1e-6 * ONES.nbytes / plain["best_ms"])
    # A case without operations has no floor, and one without its baseline has no ratio.
    assert (near["share"], near["host_ms"]) == (None, None)
    (alone,) = timing.measure(case_of(near=providers["near"]))
    assert alone["ratio"] is None
    lines = table.summary([plain, near])
    assert lines[-3].startswith("ones")
    assert [line.split()[0] for line in lines[-2:]] == ["plain", "near"]
    assert all(len(line) <= table.WIDTH for line in lines)


@pytest.mark.parametrize(("difference", "tolerance"), [(1e-6, 0), (1e-3, 1e-4), (float("nan"), 1.0)])
def test_a_wrong_answer_is_never_timed(difference: float, tolerance: float) -> None:
    calls = []

    def wrong() -> torch.Tensor:
        calls.append(difference)
        return ONES + difference

    with pytest.raises(AssertionError, match="wrong on ones"):
        timing.measure(case_of(wrong=Provider(wrong, tolerance)))
    assert len(calls) == 1


def test_the_floor_counts_operations_and_bytes() -> None:
    problem = Problem(6, 200, "official", "bfloat16", True)
    case = bench_rational_adapter.case_of(problem, [])
    assert case.operations == 3.5 * 6 * (8 * 200 * 512**2 + 6 * 200**2 * 512)
    assert case.least_bytes == 2 * (2 * 6 * (512**2 + 512) + 206 * 512 + 6 * 200)
