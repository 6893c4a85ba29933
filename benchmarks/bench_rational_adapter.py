"""The whole adapter, forward and forward+backward, every provider in one interleaved run.

Providers: the literal float32 baseline, the reference, torch.compile of the reference, and every compiled backend that
serves the device, the cpu backend in float32 too; --providers names some of them. On a processor that does not multiply
bfloat16, plain PyTorch in it is left out: its products are hundreds of times slower than float32's. pytest-benchmark
times the whole case; each provider's figures are in its extra_info and in the table.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import harness
from .harness import Case

SHAPES = [(1, 50), (1, 500), (6, 200), (6, 1000), (64, 100), (32, 1000)]
MOST_BASELINE_BYTES = 8 * 2**30
"""The literal baseline is left out where its K x K tensors alone would need more."""


def baseline_bytes(case: Case) -> int:
    heads = 8 if case.preset == "official" else 1
    return 6 * 4 * case.batch * heads * case.classes**2


def providers(case: Case) -> list[str]:
    """All of a case, the baseline first where it fits."""
    names = [harness.BASELINE] if baseline_bytes(case) <= MOST_BASELINE_BYTES else []
    if harness.multiplies(case):
        names += ["reference", harness.COMPILED]
    compiled = harness.compiled_backends(case.device)
    if "cpu" in compiled and case.dtype != "float32":
        names.append(harness.CPU_FLOAT32)
    return names + compiled


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES, ids=[f"B{batch}-K{classes}" for batch, classes in SHAPES])
def test_bench_rational_adapter(
    benchmark: Any,
    batch: int,
    classes: int,
    preset: str,
    dtype: str,
    backward: bool,
    rows: list[dict[str, Any]],
    device: str,
    wanted: list[str] | None,
) -> None:
    case = Case(batch, classes, preset, dtype, backward, device=device)
    names = providers(case)
    if wanted is not None:
        names = [name for name in names if name in wanted]
    figures = benchmark.pedantic(harness.measure, args=(case, names), rounds=1)
    found = harness.as_rows(case, figures)
    benchmark.extra_info["providers"] = found
    rows.extend(found)
