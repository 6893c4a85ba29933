"""Time calls in turn, and measure the memory that they take and what the machine can do at most.

On a CPU the time of a call is the time that passes on the clock. On a CUDA device a single call has three times. The
device's own time lies between two events; the L2 cache is flushed before the first one, and the device is kept busy
until the host has queued everything, so that no gap between launches is counted. The host's time ends when the call
returns. The wall time ends when the device has finished, which is what a program waits for.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast import _env

HOST_PRODUCT_SIZE, DEVICE_PRODUCT_SIZE = 2048, 8192
"""The rows and columns of the matrices whose product is timed to find a machine's product rate."""
HOST_COPIED_BYTES, DEVICE_COPIED_BYTES = 2**27, 2**30
"""The size of the buffer whose copy is timed to find a bandwidth: more than any cache holds."""
PASS_BYTES = tuple(sorted(factor * 2**power for power in range(14, 26) for factor in (2, 3)))
"""The sizes of smaller buffers that are gone through where the bandwidth of caches counts; see Interleaved."""
BYTES_IN_A_ROW = 2**23
"""Small buffers are gone through so often that this many bytes are timed, because a single time is over too soon."""
BURST_SECONDS = 0.1
"""A round repeats a faster call until about so much time has passed, and divides."""
SLOW_SECONDS = 1.0
"""A call that takes longer is not warmed up by another call."""
PROBES = 3
"""A round measures the limits of the machine so often; the best of all rounds counts."""
MIN_ROUNDS, MAX_ROUNDS = 3, 1000
"""A slow call is timed in so many rounds however long they take, and a fast one in no more than so many."""

Call = Callable[[], Any]
Counter = Callable[[], dict[str, float]]
"""A function that returns the seconds of the parts of a call, by name, since it was last asked."""


class Sample(NamedTuple):
    """The milliseconds of one call. host and wall are given on a CUDA device only."""

    ms: float
    host: float | None = None
    wall: float | None = None


def sample(call: Call, device: str) -> Sample:
    """Time one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return Sample(1e3 * (time.perf_counter() - start))
    host, wall = host_and_wall_ms(call)
    return Sample(device_ms(call, host, device), host, wall)


def host_and_wall_ms(call: Call) -> tuple[float, float]:
    """Return the milliseconds until a call returns, and until the device has finished; it is idle at the start."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (returned - start), 1e3 * (time.perf_counter() - start)


def device_ms(call: Call, queued_ms: float, device: str = "cuda") -> float:
    """Return the milliseconds that the device works on one call, with nothing in its L2 cache at the start.

    queued_ms: how long the host takes to queue the call; the device is kept busy for longer than that.
    """
    cycles = int(_cycles_per_second() * min(0.1, 1.5e-3 * queued_ms + 50e-6))
    torch.cuda.synchronize()
    _flusher(device).zero_()
    torch.cuda._sleep(cycles)
    return _between_events(call)


def _between_events(call: Call) -> float:
    """Return the milliseconds between an event before the call and one after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@cache
def _flusher(device: str) -> Tensor:
    """Make a tensor of twice the size of the L2 cache: writing it drives out everything else."""
    return torch.empty(2 * _env.cuda_cache_bytes(), dtype=torch.int8, device=device)


@cache
def _cycles_per_second() -> float:
    """Measure the clock of torch.cuda._sleep, which may not be the one that the device's description names."""
    cycles = 20_000_000
    # The first call raises the clock to where it stays.
    torch.cuda._sleep(cycles)
    return cycles / (_between_events(lambda: torch.cuda._sleep(cycles)) * 1e-3)


@cache
def product_rate(dtype: str, device: str) -> float:
    """Return the machine's matrix-product rate in operations per second: the best of several products of PyTorch's.

    A multiply-add counts as two operations. float32 multiplies as torch.set_float32_matmul_precision says; "highest",
    the default, keeps off tensor cores.
    """
    product = _product(dtype, device)
    return product.amount / (1e-3 * min(sample(product.call, device).ms for _ in range(12)))


@cache
def bandwidth(device: str) -> float:
    """Return the bytes per second in a large copy, counting those read and those written: the best of several."""
    copy = _copy(device)
    return copy.amount / (1e-3 * min(sample(copy.call, device).ms for _ in range(10)))


def _passes(device: str, size: int) -> list[_Probe]:
    """Make the ways to go through a buffer: reading it, changing it in place, and copying it.

    A machine that reads more bytes in a second than it writes has another fastest way than one that does not.
    """
    buffer, _ = _slices(device, size)
    return [
        _Probe(buffer.sum, buffer.nbytes),
        _Probe(lambda: buffer.mul_(1.0), 2 * buffer.nbytes),
        _copy(device, size),
    ]


class _Probe(NamedTuple):
    """A call whose time tells what the machine can do, and the operations or bytes of it."""

    call: Call
    amount: float


def _product(dtype: str, device: str) -> _Probe:
    size = HOST_PRODUCT_SIZE if device == "cpu" else DEVICE_PRODUCT_SIZE
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(left)
    return _Probe(lambda: torch.mm(left, right, out=out), 2 * size**3)


def _onednn_product(dtype: str, device: str) -> _Probe | None:
    """Make the same product by oneDNN with reordered weights, or return None where PyTorch has no operator for it.

    On an AMD processor it is more than twice as fast in float32 as PyTorch's own.
    """
    if device != "cpu" or not _env.has_onednn():
        return None
    left, right = (torch.randn(HOST_PRODUCT_SIZE, HOST_PRODUCT_SIZE).to(getattr(torch, dtype)) for _ in range(2))
    try:
        reordered = torch.ops.mkldnn._reorder_linear_weight(right)

        def call() -> Tensor:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(left, reordered, None, "none", [], "")
            return product

        call()
    except (AttributeError, RuntimeError):  # this PyTorch has other operators, or this processor lacks instructions
        return None
    return _Probe(call, 2 * HOST_PRODUCT_SIZE**3)


def _copied_bytes(device: str) -> int:
    return HOST_COPIED_BYTES if device == "cpu" else DEVICE_COPIED_BYTES


@cache
def _buffers(device: str, size: int) -> tuple[Tensor, Tensor]:
    """Make two buffers of so many bytes, which are made only once."""
    # Memory that was only asked for would be read from one page of zeros.
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    return source, torch.ones_like(source)


def _slices(device: str, size: int) -> tuple[Tensor, Tensor]:
    """Return so many bytes of each of two buffers."""
    source, target = _buffers(device, _copied_bytes(device))
    return source[: size // 4], target[: size // 4]


def _copy(device: str, size: int | None = None) -> _Probe:
    """Make the copy of a buffer. size: its bytes, or None for more than any cache holds."""
    source, target = _slices(device, size or _copied_bytes(device))
    return _Probe(lambda: target.copy_(source), 2 * source.nbytes)


class Memory(NamedTuple):
    """The peak of memory in MiB during a call: all that was in use, and what was not in use before it.

    It is that of the CUDA device or, on a CPU, the resident memory of the process.
    """

    peak_mib: float
    extra_mib: float


def memory_of(call: Call, device: str) -> Memory | None:
    """Call once, and return the memory that this took, or None where the system does not tell."""
    return _host_memory_of(call) if device == "cpu" else _device_memory_of(call)


def _device_memory_of(call: Call) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Memory(peak / 2**20, (peak - before) / 2**20)


def _host_memory_of(call: Call) -> Memory | None:
    status = Path("/proc/self/status")
    before: int | None = None
    if sys.platform.startswith("linux"):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
            before = _kib(status, "VmRSS")
        except OSError:  # a container may forbid it
            before = None
    call()
    if before is None:
        return None
    peak = _kib(status, "VmHWM")
    return Memory(peak / 1024, (peak - before) / 1024)


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


@dataclass(frozen=True)
class Times:
    """The milliseconds of a call in each round, the same round at the same place for every call."""

    rounds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least of the milliseconds."""
        return min(self.rounds)

    @property
    def median(self) -> float:
        """The median of the milliseconds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The distance of the quartiles; 0 for a single round."""
        if len(self.rounds) == 1:
            return 0.0
        quarter, _, three_quarters = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return three_quarters - quarter

    def over(self, others: Sequence[Times]) -> Times:
        """Return the ratio to the sum of other milliseconds, round by round."""
        return Times(tuple(own / other for own, other in zip(self.rounds, added(others).rounds, strict=True)))


def added(several: Sequence[Times]) -> Times:
    """Return the sum of several times, round by round."""
    return Times(tuple(map(sum, zip(*(times.rounds for times in several), strict=True))))


class Interleaved(NamedTuple):
    """What calls took that were timed in turn, and what the machine could do at the same time.

    times, memory: by the name of the call.
    parts: the times of the parts of a call as they were counted while it ran, by the names of the call and of the part.
    product_rates: the operations per second in the product of two large matrices, by type and library.
    bandwidth: the bytes per second of a large copy, which is that of the main memory.
    passes: the bytes per second of going through buffers of many sizes in the fastest way, by the number of bytes that
        are read and written.
    """

    times: dict[str, Times]
    memory: dict[str, Memory | None]
    product_rates: dict[tuple[str, str], float]
    bandwidth: float
    parts: Mapping[tuple[str, str], Times] = MappingProxyType({})
    passes: Mapping[int, float] = MappingProxyType({})

    def bandwidth_of(self, moved: float) -> float:
        """Return the bytes per second of the fastest way to read and write so many bytes, or more."""
        least = min(moved, max(self.passes, default=0.0))
        return max([self.bandwidth, *(rate for size, rate in self.passes.items() if size >= least)])

    def product_rate(self, dtype: str) -> float:
        """Return the operations per second of the fastest library for a type."""
        return max(rate for (own, _), rate in self.product_rates.items() if own == dtype)


def interleaved(
    calls: Mapping[str, Call],
    device: str,
    *,
    seconds: float,
    repeats: int | None = None,
    dtypes: Iterable[str] = (),
    burst: int | None = None,
    counters: Mapping[str, Counter] = MappingProxyType({}),
    caches: bool = False,
) -> Interleaved:
    """Time calls in turn, round after round, so that a machine that slows down slows all of them.

    A round also times a large product of each type and a large copy, so that the limits of the machine are measured
    in the same minutes. A call that takes less than BURST_SECONDS is repeated in each round, and its time is the mean.

    calls: the calls, by name.
    device: "cpu", or where PyTorch finds the CUDA device.
    seconds: about how long all rounds take together; there are at least MIN_ROUNDS.
    repeats: the number of rounds, if it does not depend on the time. With a single one, a slow call is made only once,
        for its time and its memory.
    dtypes: the types of the products whose rate is measured.
    burst: the number of calls in a row whose mean is the time of a round, if it does not depend on the time.
    counters: for some calls, by their names, what counts the time of their parts.
    caches: whether going through buffers of many sizes is timed too, smaller ones of which caches hold.
    """
    memory, bursts, once = {}, {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        memory[name] = memory_of(call, device)
        if (took := time.perf_counter() - start) < SLOW_SECONDS:
            # The first call may have allocated what later ones find.
            memory[name] = memory_of(call, device)
            took = 1e-3 * burst_ms(call, 1, device)
        elif repeats == 1:
            once[name] = 1e3 * took
        bursts[name] = burst or max(1, int(BURST_SECONDS / took))
    probes = {(dtype, "PyTorch"): _product(dtype, device) for dtype in dtypes}
    probes |= {
        (dtype, "oneDNN"): probe for dtype, _ in list(probes) if (probe := _onednn_product(dtype, device)) is not None
    }
    copy = _copy(device)
    largest = _copied_bytes(device)
    sizes = [*(size for size in PASS_BYTES if size < largest), largest] if caches else []
    through = [probe for size in sizes for probe in _passes(device, size)]
    for probe in (*probes.values(), copy, *through):
        probe.call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    rates: dict[tuple[str, str], list[float]] = {name: [] for name in probes}
    copies: list[float] = []
    passes: dict[int, float] = {}
    parts: dict[tuple[str, str], list[float]] = {}
    began, rounds = time.perf_counter(), 0
    while not _enough(rounds, time.perf_counter() - began, seconds, repeats):
        for name, call in calls.items():
            counter = counters.get(name, dict)
            counter()
            found[name].append(once[name] if name in once else burst_ms(call, bursts[name], device))
            for part, took in counter().items():
                parts.setdefault((name, part), []).append(1e3 * took / bursts[name])
        for _ in range(PROBES):
            for key, probe in probes.items():
                rates[key].append(probe.amount / (1e-3 * burst_ms(probe.call, 1, device)))
            copies.append(copy.amount / (1e-3 * burst_ms(copy.call, 1, device)))
            for probe in through:
                moved = int(probe.amount)
                ms = burst_ms(probe.call, max(1, BYTES_IN_A_ROW // moved), device)
                passes[moved] = max(passes.get(moved, 0.0), moved / (1e-3 * ms))
        rounds += 1
    return Interleaved(
        {name: Times(tuple(times)) for name, times in found.items()},
        memory,
        {key: max(values) for key, values in rates.items()},
        max(copies),
        {key: Times(tuple(times)) for key, times in parts.items()},
        passes,
    )


def _enough(rounds: int, elapsed: float, seconds: float, repeats: int | None) -> bool:
    """Return whether there have been enough rounds, or another one would probably take longer than the seconds."""
    if repeats is not None:
        return rounds >= repeats
    return rounds >= MIN_ROUNDS and (rounds >= MAX_ROUNDS or elapsed * (rounds + 1) / rounds > seconds)


def burst_ms(call: Call, times: int, device: str) -> float:
    """Return the milliseconds of one of several calls in a row, until a device has finished the last one."""

    def burst() -> None:
        for _ in range(times):
            call()

    if device != "cpu":
        torch.cuda.synchronize()
        return _between_events(burst) / times
    start = time.perf_counter()
    burst()
    return 1e3 * (time.perf_counter() - start) / times
