"""What this device can do at most: its product rates, its bandwidth, and what a launch costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rada_fast.bench import timing


@pytest.fixture
def on_device(device: str) -> None:
    if device == "cpu":
        pytest.skip("no device: this measures a CUDA device")


def record(rows: list[dict[str, Any]], case: str, value: float, unit: str) -> None:
    rows.append({"case": case, "value": value, "unit": unit})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bench_floor_products(benchmark: Any, dtype: str, rows: list[dict[str, Any]]) -> None:
    rate = benchmark.pedantic(timing.product_rate, args=(dtype, "cuda"), rounds=1)
    record(rows, f"{dtype} products", rate / 1e12, "TFLOP/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_tf32_products(benchmark: Any, rows: list[dict[str, Any]]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rate = benchmark.pedantic(timing.product_rate.__wrapped__, args=("float32", "cuda"), rounds=1)
    finally:
        torch.set_float32_matmul_precision(before)
    record(rows, "TF32 products", rate / 1e12, "TFLOP/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_bandwidth(benchmark: Any, rows: list[dict[str, Any]]) -> None:
    record(rows, "copy", benchmark.pedantic(timing.bandwidth, args=("cuda",), rounds=1) / 1e9, "GB/s")


@pytest.mark.usefixtures("on_device")
def test_bench_floor_launch(benchmark: Any, rows: list[dict[str, Any]]) -> None:
    small = torch.zeros(1, device="cuda")

    def hundred() -> None:
        for _ in range(100):
            small.add_(1)

    def measure() -> tuple[float, float]:
        hundred()
        hosts = sorted(timing.host_and_wall_ms(hundred)[0] for _ in range(20))
        on_device = sorted(timing.device_ms(hundred, hosts[-1]) for _ in range(20))
        return hosts[10], on_device[10]

    host, on_device = benchmark.pedantic(measure, rounds=1)
    record(rows, "a launch on the host", 10 * host, "us")
    record(rows, "a launch on the device", 10 * on_device, "us")
