"""What is measured on a CUDA device, on a clock of the host's that stands in for one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import device_timing, harness, interleaved
from benchmarks.harness import Case


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
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A device that works while the host waits: a millisecond is a million cycles. Holds what it was told to sleep."""
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
    for name, value in {"DEVICE": "cpu", "PRODUCT_SIZE": 64, "COPIED_BYTES": 2**12}.items():
        monkeypatch.setattr(device_timing, name, value)
    cached = ("_flusher", "_cycles_per_second", "matrix_peak", "bandwidth")
    for name in cached:
        getattr(device_timing, name).cache_clear()
    yield cycles
    for name in cached:
        getattr(device_timing, name).cache_clear()


def test_the_device_is_kept_busy_while_the_host_queues(slept: list[int]) -> None:
    assert device_timing.device_ms(lambda: time.sleep(2e-3), 4.0) >= 2.0
    # Half as long again as the host needs, by the clock that was measured.
    assert slept[-1] >= 1.5e-3 * 4.0 * device_timing._cycles_per_second()
    host, wall = device_timing.host_and_wall_ms(lambda: time.sleep(1e-3))
    assert 1.0 <= host <= wall


def test_every_provider_has_a_share_of_the_floor(slept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.0)
    # Tensors of "cpu:0" are on the CPU, and the case is one of a device.
    case = Case(2, 5, "official", "float32", True, width=64, device="cpu:0")
    figures = harness.measure(case, ["literal", "reference"])
    rows = harness.as_rows(case, figures)
    assert [row["provider"] for row in rows] == ["literal", "reference"]
    for row in rows:
        assert row["host_ms"] <= row["wall_ms"]
        assert row["share"] == pytest.approx(row["floor_ms"] / row["best_ms"])
        assert row["extra_mib"] == 2.0
    operations = case.operations / device_timing.matrix_peak("float32")
    assert rows[0]["floor_ms"] == pytest.approx(1e3 * max(operations, case.least_bytes / device_timing.bandwidth()))


def test_small_ops_have_the_hosts_time_beside(slept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "SECONDS", 0.0)
    (row,) = interleaved.measure("case", {"one": lambda: None}, "one", least_bytes=1, device="cpu:0")
    assert row["ratio"] == 1.0
    assert row["host_us"] >= 0
