"""Times on a CUDA device, and the device's own measured limits.

A step has three times. On the device: between two events, with the L2 cache flushed before the first one and with the
device kept busy until the host has queued everything, so that no gap between launches is counted. On the host: until
the call returns, with an idle device. On the wall: until the device has finished, which is what a program waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Step = Callable[[], Any]

DEVICE = "cuda"
PRODUCT_SIZE = 8192
COPIED_BYTES = 2**30
"""More than any cache holds, of one of two buffers."""


@cache
def _flusher() -> torch.Tensor:
    """Twice the L2 cache: writing it leaves nothing of the inputs in there."""
    size = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.int8, device=DEVICE)


@cache
def _cycles_per_second() -> float:
    """Of torch.cuda._sleep, measured: the clock may not be the one that the device's description names."""
    cycles = 20_000_000
    # The first one raises the clock.
    torch.cuda._sleep(cycles)
    return cycles / (_between_events(lambda: torch.cuda._sleep(cycles)) * 1e-3)


def _between_events(step: Step) -> float:
    """Milliseconds between an event before the step and one after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def device_ms(step: Step, queued_ms: float) -> float:
    """Milliseconds that the device works on one step, L2 flushed. queued_ms: what the host needs to queue it."""
    cycles = int(_cycles_per_second() * min(0.1, 1.5e-3 * queued_ms + 50e-6))
    torch.cuda.synchronize()
    _flusher().zero_()
    torch.cuda._sleep(cycles)
    return _between_events(step)


def host_and_wall_ms(step: Step) -> tuple[float, float]:
    """Milliseconds until the call returns, and until the device has finished; an idle device at the start."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (returned - start), 1e3 * (time.perf_counter() - start)


@cache
def matrix_peak(dtype: str) -> float:
    """The device's matrix-product rate in operations per second: the best of several large products of PyTorch's.

    float32 multiplies as torch.set_float32_matmul_precision says; "highest", the default, keeps off tensor cores.
    """
    size = PRODUCT_SIZE
    left, right = (torch.randn(size, size, device=DEVICE).to(getattr(torch, dtype)) for _ in range(2))
    for _ in range(3):
        left @ right
    best = min(device_ms(lambda: left @ right, 0.1) for _ in range(10))
    return 2 * size**3 / best * 1e3


@cache
def bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes together; the best of several."""
    source = torch.zeros(COPIED_BYTES // 4, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    best = min(device_ms(lambda: target.copy_(source), 0.1) for _ in range(10))
    return 2 * source.nbytes / best * 1e3


def extra_mib(step: Step) -> float:
    """Peak device memory of one call beyond what stood before it, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
