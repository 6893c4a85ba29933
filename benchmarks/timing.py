"""The one way in which benchmarks measure: compare every answer, then time all providers of a case in turn.

A case is one problem, and its providers are different ways to solve it. They run one after the other, round after
round, so that a machine that slows down slows all of them, and the best of many rounds is what is compared. On a CUDA
device that is the device's own time; rada_fast/bench/timing.py says how a call is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, equal

from rada_fast import _env
from rada_fast.bench.timing import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Call,
    Sample,
    bandwidth,
    memory_of,
    product_rate,
    sample,
)

SECONDS = 2.0
"""About this long all rounds of one provider take together."""
WARM_UP_CALLS, WARM_UP_SECONDS = 3, 0.2
"""Before it is timed a provider is called so often, or until so much time has passed."""


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
        assert equal(answer, case.expected), f"{name} on {case.name}: the answer differs from the expected one"
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


def figures(case: Case, provider: Provider, samples: list[Sample], baseline_ms: float | None) -> dict[str, Any]:
    """The figures of one provider, as ``measure`` describes them."""
    times = [one.ms for one in samples]
    quarter, median, three_quarters = statistics.quantiles(times, n=4, method="inclusive")
    best = min(times)
    floors = [1e3 * case.operations / product_rate(provider.dtype, case.device)] if case.operations else []
    floors += [1e3 * case.least_bytes / bandwidth(case.device)] if case.on_device else []
    floor = max(floors, default=None)
    memory = memory_of(provider.call, case.device)
    return {
        "rounds": len(times),
        "best_ms": best,
        "median_ms": median,
        "spread_ms": three_quarters - quarter,
        "ratio": None if baseline_ms is None else baseline_ms / best,
        "floor_ms": floor,
        "share": None if floor is None else floor / best,
        "gb_per_s": 1e-6 * case.least_bytes / best,
        "extra_mib": None if memory is None else memory.extra_mib,
        "host_ms": statistics.median(one.host for one in samples if one.host is not None) if case.on_device else None,
        "wall_ms": statistics.median(one.wall for one in samples if one.wall is not None) if case.on_device else None,
    }
