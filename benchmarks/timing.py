"""The one way in which benchmarks measure: compare every answer, then time all providers of a case in turn.

A case is one problem, and its providers are different ways to solve it. They run one after the other, round after
round, so that a machine that slows down slows all of them, and the best of many rounds is what is compared.

On a CPU, the time of a call is the time that passes on the clock. On a CUDA device a call has three times. The device's
own time lies between two events; the L2 cache is flushed before the first one, and the device is kept busy until the
host has queued everything, so that no gap between launches is counted. The host's time ends when the call returns. The
wall time ends when the device has finished, which is what a program waits for. The first of the three is the one
compared.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast import _env

SECONDS = 2.0
"""About this long all rounds of one provider take together."""
MIN_ROUNDS, MAX_ROUNDS = 3, 1000
"""A slow provider runs so many rounds however long they take, and a fast one no more than so many."""
WARM_UP_CALLS, WARM_UP_SECONDS = 3, 0.2
"""Before it is timed a provider is called so often, or until so much time has passed."""
HOST_PRODUCT_SIZE, DEVICE_PRODUCT_SIZE = 2048, 8192
"""The rows and columns of the matrices whose product is timed to find a machine's product rate."""
COPIED_BYTES = 2**30
"""The size of the buffer whose copy is timed to find a device's bandwidth: more than any cache holds."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Provider:
    """One way to solve a case.

    call: solves it once and returns the answer.
    tolerance: how large the error of the answer may be, as the norm of its difference from the expected answer over the
        norm of the expected one. 0 asks for equal bits. None: the answer cannot be compared, because it is drawn at
        random, say.
    dtype: the type of its matrix products, if the case has any.
    """

    call: Call
    tolerance: float | None
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, and everything that is needed to measure it.

    name: its name in the table.
    device: "cpu", or where PyTorch finds the CUDA device.
    providers: the ways to solve it, by name.
    baseline: the provider that the others are compared with; it may be absent, and then nothing is.
    expected: the right answer, for the providers that have a tolerance.
    least_bytes: what any provider must at least read and write.
    operations: of the matrix products that any provider must at least compute; 0 where they do not matter.
    sizes: further fields for the rows of the case.
    """

    name: str
    device: str
    providers: Mapping[str, Provider]
    baseline: str
    least_bytes: float
    expected: Tensor | None = None
    operations: float = 0.0
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_device(self) -> bool:
        return self.device != "cpu"


class Sample(NamedTuple):
    """The milliseconds of one call. host and wall are given on a CUDA device only."""

    ms: float
    host: float | None = None
    wall: float | None = None


def default_device() -> str:
    """Where benchmarks run if nobody says otherwise: the CUDA device if there is one, else the CPU."""
    return "cuda" if _env.has_cuda() else "cpu"


def measure(case: Case) -> list[dict[str, Any]]:
    """Compare the answers of all providers, time them in turn, and return a row of figures for each.

    A row holds the case's name and sizes and:

    provider, rounds: its name, and how often it was timed.
    best_ms, median_ms, spread_ms: the best time, the median, and how far the quartiles lie apart.
    ratio: the baseline's best time over this one's; None without a baseline.
    floor_ms: the least time that the machine's measured limits allow. On a device it is the greater of the times that
        the operations take at the product rate and the bytes at the bandwidth; on a CPU only the operations count.
    share: floor_ms over best_ms.
    gb_per_s: the least bytes over the best time.
    extra_mib: the peak memory during a call beyond what was in use before it.
    host_ms, wall_ms: medians, on a device only.

    Raises AssertionError naming the provider whose answer is wrong.
    """
    left = {}
    for name, provider in case.providers.items():
        compare(case, name, provider)
        seconds = warm_up(provider.call, case.device)
        left[name] = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / seconds)))
    samples: dict[str, list[Sample]] = {name: [] for name in left}
    while any(left.values()):
        for name, provider in case.providers.items():
            if left[name]:
                left[name] -= 1
                samples[name].append(sample(provider.call, case.device))
    baseline_ms = min((one.ms for one in samples.get(case.baseline, [])), default=None)
    return [
        {
            "case": case.name,
            **case.sizes,
            "provider": name,
            **figures(case, provider, samples[name], baseline_ms),
        }
        for name, provider in case.providers.items()
    ]


def compare(case: Case, name: str, provider: Provider) -> None:
    """Call a provider once. Raises AssertionError where its answer is further from the expected one than it may be."""
    answer = provider.call()
    if provider.tolerance is None:
        return
    assert case.expected is not None, f"{case.name}: {name} has a tolerance, and no expected answer is given"
    if provider.tolerance == 0:
        assert torch.equal(answer, case.expected), f"{name} on {case.name}: the answer differs from the expected one"
        return
    expected = case.expected.float()
    error = float((answer.float() - expected).norm() / expected.norm())
    assert error <= provider.tolerance, f"{name} on {case.name}: relative error {error:.1e} > {provider.tolerance:.0e}"


def warm_up(call: Call, device: str) -> float:
    """Call a few times as the rounds will. Returns the seconds of the last time, with all that belongs to a round."""
    began = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        start = time.perf_counter()
        sample(call, device)
        end = time.perf_counter()
        if end - began > WARM_UP_SECONDS:
            break
    return end - start


def sample(call: Call, device: str) -> Sample:
    """Time one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return Sample(1e3 * (time.perf_counter() - start))
    host, wall = host_and_wall_ms(call)
    return Sample(device_ms(call, host, device), host, wall)


def figures(case: Case, provider: Provider, samples: list[Sample], baseline_ms: float | None) -> dict[str, Any]:
    """The figures of one provider, as ``measure`` describes them."""
    times = [one.ms for one in samples]
    quarter, median, three_quarters = statistics.quantiles(times, n=4, method="inclusive")
    best = min(times)
    floors = [1e3 * case.operations / product_rate(provider.dtype, case.device)] if case.operations else []
    floors += [1e3 * case.least_bytes / bandwidth(case.device)] if case.on_device else []
    floor = max(floors, default=None)
    return {
        "rounds": len(times),
        "best_ms": best,
        "median_ms": median,
        "spread_ms": three_quarters - quarter,
        "ratio": None if baseline_ms is None else baseline_ms / best,
        "floor_ms": floor,
        "share": None if floor is None else floor / best,
        "gb_per_s": 1e-6 * case.least_bytes / best,
        "extra_mib": (extra_device_mib if case.on_device else extra_host_mib)(provider.call),
        "host_ms": statistics.median(one.host for one in samples if one.host is not None) if case.on_device else None,
        "wall_ms": statistics.median(one.wall for one in samples if one.wall is not None) if case.on_device else None,
    }


def host_and_wall_ms(call: Call) -> tuple[float, float]:
    """Milliseconds until the call returns, and until the device has finished; the device is idle at the start."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (returned - start), 1e3 * (time.perf_counter() - start)


def device_ms(call: Call, queued_ms: float, device: str = "cuda") -> float:
    """Milliseconds that the device works on one call, with nothing in its L2 cache at the start.

    queued_ms: how long the host takes to queue the call; the device is kept busy for longer than that.
    """
    cycles = int(_cycles_per_second() * min(0.1, 1.5e-3 * queued_ms + 50e-6))
    torch.cuda.synchronize()
    _flusher(device).zero_()
    torch.cuda._sleep(cycles)
    return _between_events(call)


def _between_events(call: Call) -> float:
    """Milliseconds between an event before the call and one after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@cache
def _flusher(device: str) -> Tensor:
    """A tensor of twice the size of the L2 cache: writing it drives out everything else."""
    size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.int8, device=device)


@cache
def _cycles_per_second() -> float:
    """The clock of torch.cuda._sleep, measured: it may not be the one that the device's description names."""
    cycles = 20_000_000
    # The first call raises the clock to where it stays.
    torch.cuda._sleep(cycles)
    return cycles / (_between_events(lambda: torch.cuda._sleep(cycles)) * 1e-3)


@cache
def product_rate(dtype: str, device: str) -> float:
    """The machine's matrix-product rate in operations per second: the best of several large products of PyTorch's.

    float32 multiplies as torch.set_float32_matmul_precision says; "highest", the default, keeps off tensor cores.
    """
    size = HOST_PRODUCT_SIZE if device == "cpu" else DEVICE_PRODUCT_SIZE
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best = min(sample(lambda: left @ right, device).ms for _ in range(12))
    return 2 * size**3 / (1e-3 * best)


@cache
def bandwidth(device: str) -> float:
    """A device's bytes per second in a large copy, counting those read and those written: the best of several."""
    source = torch.zeros(COPIED_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = min(sample(lambda: target.copy_(source), device).ms for _ in range(10))
    return 2 * source.nbytes / (1e-3 * best)


def extra_device_mib(call: Call) -> float:
    """The peak memory of the device during one call beyond what was in use before it, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


def extra_host_mib(call: Call) -> float | None:
    """The same of resident memory on a CPU; None where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = _kib(status, "VmRSS")
    call()
    return (_kib(status, "VmHWM") - before) / 1024


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
