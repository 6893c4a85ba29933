"""Providers of a small op, timed in turn round after round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import device_timing

ROUNDS, SECONDS = 2000, 1.0
"""At most so many rounds of a case, and about so many seconds for a provider."""


def measure(
    case: str, steps: Mapping[str, Callable[[], Any]], baseline: str, *, least_bytes: int, device: str
) -> list[dict[str, Any]]:
    """A record a provider: microseconds at the 20th, 50th and 80th percentile, ratio of the baseline's median to its
    own, GB/s of the bytes that have to be read and written. On a CUDA device the device's own time with a flushed L2
    cache, and host_us, the median until the call returns; see device_timing.
    """
    on_device = device != "cpu"
    costs = []
    for step in steps.values():
        for _ in range(3):
            start = time.perf_counter()
            if on_device:
                device_timing.device_ms(step, device_timing.host_and_wall_ms(step)[0])
            else:
                step()
        costs.append(time.perf_counter() - start)
    times: dict[str, list[float]] = {name: [] for name in steps}
    hosts: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(5, min(ROUNDS, int(SECONDS * len(steps) / sum(costs))))):
        for name, step in steps.items():
            if on_device:
                hosts[name].append(1e3 * device_timing.host_and_wall_ms(step)[0])
                times[name].append(1e3 * device_timing.device_ms(step, hosts[name][-1] / 1e3))
            else:
                start = time.perf_counter()
                step()
                times[name].append(1e6 * (time.perf_counter() - start))
    quantiles = {
        name: torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for name, values in times.items()
    }
    return [
        {
            "case": case,
            "provider": name,
            "us_20": low,
            "us_50": median,
            "us_80": high,
            "ratio": quantiles[baseline][1] / median,
            "gb_per_s": least_bytes / median / 1e3,
            "rounds": len(times[name]),
            "host_us": sorted(hosts[name])[len(hosts[name]) // 2] if on_device else None,
        }
        for name, (low, median, high) in quantiles.items()
    ]
