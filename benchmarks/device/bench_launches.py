"""Where the device's time goes in a step of the adapter: each kernel by itself, and the step replayed as a CUDA graph.

The profiler's times of kernels leave out the gaps between them; the replay has the gaps that are left in a graph. Both
run again and again on the same data, so what the L2 cache can hold is in it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rada_fast.bench import timing
from rada_fast.bench.adapter import Problem, call_of

SHAPES = [(1, 50), (1, 500), (6, 200), (6, 1000), (64, 100)]
CALLS = 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES, ids=[f"B{batch}-K{classes}" for batch, classes in SHAPES])
def test_bench_launches(
    benchmark: Any, device: str, rows: list[dict[str, Any]], batch: int, classes: int, dtype: str
) -> None:
    if device == "cpu":
        pytest.skip("no device: this measures a CUDA device")
    call = call_of(Problem(batch, classes, "official", dtype, backward=True, device=device), "triton")

    def launches() -> dict[str, list[float]]:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for event in profiled.events():
            if event.device_type.name == "CUDA":
                found[event.name].append(event.time_range.elapsed_us())
        return found

    def replayed_us() -> float:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replays() -> None:
            for _ in range(CALLS):
                graph.replay()

        replays()
        host = timing.host_and_wall_ms(replays)[0]
        return 1e3 / CALLS * min(timing.device_ms(replays, host, device) for _ in range(5))

    case = f"{batch} x {classes}"
    found = benchmark.pedantic(launches, rounds=1)
    ours = {name: times for name, times in found.items() if name.endswith("_kernel") and "at::" not in name}
    times = {name.removesuffix("_kernel"): sum(some) / CALLS for name, some in sorted(ours.items())}
    times["all of these"] = sum(times.values())
    times["with PyTorch's own"] = sum(map(sum, found.values())) / CALLS
    for launch, microseconds in times.items():
        rows.append({"case": case, "launch": f"{dtype} {launch}", "us": microseconds})
    rows.append({"case": case, "launch": f"{dtype} the step in a graph", "us": replayed_us()})
