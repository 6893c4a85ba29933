"""Shared by the benchmarks: interleaved timing, the machine's own matrix-product peak, peak extra memory.

Providers of one case run in turn, round after round, so that a machine that slows down slows all of them; each
provider's figures are over its own rounds. Times are of calls that were checked against the reference: wall time on a
CPU, on a CUDA device the device's own with a flushed L2 cache, beside the host's and the wall's (see device_timing).
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends, use_backend

from . import device_timing

BASELINE = "literal"
COMPILED = "compile"
"""The provider that is torch.compile of the reference."""
CPU_FLOAT32 = "cpu-float32"
"""The provider that is the cpu backend in float32, whatever the others store."""
FLOAT32_ONLY = (BASELINE, CPU_FLOAT32)
SECONDS_PER_CASE = 2.0
"""Least time for a provider's rounds together; slow ones take MIN_ROUNDS whatever they cost."""
MIN_ROUNDS, MAX_ROUNDS = 3, 200
STEP_IN_FORWARDS = 3.5
"""A forward and backward pass counts as this many forwards' operations."""

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One measured problem: images B, classes K, width D, preset, storage type, with or without the backward pass."""

    batch: int
    classes: int
    preset: str
    dtype: str
    backward: bool
    width: int = 512
    device: str = "cpu"

    def __str__(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        place = "" if self.device == "cpu" else f" {self.device}"
        return f"{self.preset} B={self.batch} K={self.classes} {self.dtype} {passes}{place}"

    @property
    def operations(self) -> float:
        """F_min = B (8 K D^2 + 6 K^2 D), times 3.5 with the backward pass."""
        forward = self.batch * (8 * self.classes * self.width**2 + 6 * self.classes**2 * self.width)
        return forward * (STEP_IN_FORWARDS if self.backward else 1)

    @property
    def least_bytes(self) -> float:
        """Weights, biases and features read once and logits written; with the backward pass the weights' gradients too.

        A step whose tensors all stayed on chip would move no less.
        """
        parameters = 6 * (self.width**2 + (self.width if self.preset == "official" else 0))
        elements = parameters * (2 if self.backward else 1) + (self.batch + self.classes) * self.width
        return (elements + self.batch * self.classes) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Figures:
    """One provider's figures. Times in ms; ratio: the baseline's best time over this one's; extra_mib: peak memory
    beyond what stood before the call.

    share: of the measured matrix-product peak, from the best time; on a device, floor_ms over the best time, where the
        floor is the greater of the least operations at that peak and the least bytes at the measured bandwidth.
    host_ms, wall_ms, floor_ms: on a device only; medians of the call until it returns and until it has finished."""

    median_ms: float
    best_ms: float
    spread_ms: float
    rounds: int
    ratio: float
    share: float
    extra_mib: float
    host_ms: float | None = None
    wall_ms: float | None = None
    floor_ms: float | None = None


def default_device() -> str:
    """Where the benchmarks run that are told nothing: on the CUDA device, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compiled_backends(device: str) -> list[str]:
    """The compiled backends of the adapter that are usable here and serve the device."""
    return [name for name in {"cpu": ("cpu",), "cuda": ("triton",)}[device] if backends()[name] == "usable"]


def multiplies(case: Case) -> bool:
    """Whether the device has products of the case's type; without, plain PyTorch's take minutes and say nothing."""
    return case.device != "cpu" or _env.multiplies(case.dtype)


def make_step(case: Case, backend: str) -> Step:
    """A call that gives the logits, after a backward pass if the case has one; equal inputs for every backend."""
    torch.manual_seed(0)
    # The baseline is the published code's arithmetic in float32, whatever the others store.
    dtype = torch.float32 if backend in FLOAT32_ONLY else getattr(torch, case.dtype)
    make = AdapterConfig.official if case.preset == "official" else AdapterConfig.paper
    adapter = RationalAdapter(make(case.width))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.02)
    image, text = (normalize(torch.randn(rows, case.width), dim=-1).to(dtype) for rows in (case.batch, case.classes))
    labels = torch.arange(case.batch) % case.classes
    labels, image, text = (value.to(case.device) for value in (labels, image, text))
    adapter = adapter.to(case.device, dtype)
    call: Any = torch.compile(adapter, fullgraph=True, dynamic=False) if backend == COMPILED else adapter

    def step() -> Tensor:
        with use_backend({COMPILED: "reference", CPU_FLOAT32: "cpu"}.get(backend, backend)):
            if not case.backward:
                with torch.no_grad():
                    logits: Tensor = call(image, text, 100.0)
                return logits
            logits, penalty = call(image, text, 100.0, penalty="l2")
            adapter.zero_grad()
            (cross_entropy(logits.float(), labels) + 1.5 * penalty).backward()
            return logits.detach()

    return step


def measure(case: Case, names: list[str]) -> dict[str, Figures]:
    """Figures of every provider on one case, from interleaved rounds. Raises AssertionError where one is wrong."""
    if COMPILED in names:
        # Each case compiles for its own sizes, none inherits another's guards.
        torch.compiler.reset()
    steps: Mapping[str, Step] = {name: make_step(case, name) for name in names}
    expected = make_step(dataclasses.replace(case, dtype="float32", backward=False), "reference")()
    on_device = case.device != "cpu"
    costs = {}
    for name, step in steps.items():
        error = float((step().float() - expected).norm() / expected.norm())
        # bfloat16 keeps 8 bits: logits of order s agree to about a hundredth of their norm.
        bound = 1e-4 if case.dtype == "float32" or name in FLOAT32_ONLY else 5e-2
        assert error <= bound, f"{name} on {case}: relative error {error:.1e}"
        costs[name] = device_timing.host_and_wall_ms(step)[1] / 1e3 if on_device else _seconds(step)

    left = {name: min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS_PER_CASE / cost))) for name, cost in costs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    waits: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    while any(left.values()):
        for name, step in steps.items():
            if left[name]:
                left[name] -= 1
                if on_device:
                    waits[name].append(device_timing.host_and_wall_ms(step))
                    times[name].append(device_timing.device_ms(step, waits[name][-1][0]) / 1e3)
                else:
                    times[name].append(_seconds(step))
    figures = {}
    for name, values in times.items():
        ordered = torch.tensor(sorted(values), dtype=torch.float64) * 1e3
        quarter, median, three_quarters = ordered.quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        best = min(values)
        dtype = "float32" if name in FLOAT32_ONLY or not multiplies(case) else case.dtype
        device: dict[str, float] = {}
        if on_device:
            floor = max(
                case.operations / device_timing.matrix_peak(dtype), case.least_bytes / device_timing.bandwidth()
            )
            host, wall = (sorted(pair[at] for pair in waits[name])[len(values) // 2] for at in range(2))
            device = {"host_ms": host, "wall_ms": wall, "floor_ms": 1e3 * floor}
        else:
            floor = case.operations / matrix_peak(dtype)
        figures[name] = Figures(
            median_ms=median,
            best_ms=best * 1e3,
            spread_ms=three_quarters - quarter,
            rounds=len(values),
            ratio=min(times[BASELINE]) / best if BASELINE in times else float("nan"),
            share=floor / best,
            extra_mib=(device_timing.extra_mib if on_device else extra_memory)(steps[name]),
            **device,
        )
    return figures


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@cache
def matrix_peak(dtype: str) -> float:
    """The machine's matrix-product rate in operations per second, best of several large products, in this process."""
    size = 2048
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def extra_memory(step: Step) -> float:
    """Peak resident memory of one call beyond what stood before it, in MiB; nan where the system does not say."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew at what is resident now
    before = _kib(status, "VmRSS")
    step()
    return (_kib(status, "VmHWM") - before) / 1024


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


def as_rows(case: Case, figures: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """One flat record a provider, for JSON and for the table."""
    return [{"case": str(case), **asdict(case), "provider": name, **asdict(value)} for name, value in figures.items()]
