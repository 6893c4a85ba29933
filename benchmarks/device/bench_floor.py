"""What this device can do at most: product rates, bandwidth, the cost of a launch. Every figure is held against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import device_timing


@pytest.fixture
def on_device(device: str) -> None:
    if device == "cpu":
        pytest.skip("no device: it measures a CUDA device")


def record(rows: list[dict[str, Any]], case: str, value: float, unit: str) -> None:
    rows.append({"case": case, "value": value, "unit": unit})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bench_floor_products(benchmark: Any, dtype: str, limits: list[dict[str, Any]]) -> None:
    rate = benchmark.pedantic(device_timing.matrix_peak, args=(dtype,), rounds=1)
    record(limits, f"{dtype} products", rate / 1e12, "TFLOP/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_tf32_products(benchmark: Any, limits: list[dict[str, Any]]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rate = benchmark.pedantic(device_timing.matrix_peak.__wrapped__, args=("float32",), rounds=1)
    finally:
        torch.set_float32_matmul_precision(before)
    record(limits, "TF32 products", rate / 1e12, "TFLOP/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_bandwidth(benchmark: Any, limits: list[dict[str, Any]]) -> None:
    record(limits, "copy", benchmark.pedantic(device_timing.bandwidth, rounds=1) / 1e9, "GB/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_launch(benchmark: Any, limits: list[dict[str, Any]]) -> None:
    small = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            small.add_(1)

    def measure() -> tuple[float, float]:
        hundred()
        hosts = sorted(device_timing.host_and_wall_ms(hundred)[0] for _ in range(20))
        on_device = sorted(device_timing.device_ms(hundred, hosts[-1]) for _ in range(20))
        return hosts[10], on_device[10]

    host, on_device = benchmark.pedantic(measure, rounds=1)
    record(limits, "a launch on the host", 10 * host, "us")
    record(limits, "a launch on the device", 10 * on_device, "us")
