"""The whole adapter, forward alone and forward with backward.

The providers are the literal float32 baseline, which is the published code's arithmetic, the reference, torch.compile
of the reference, and every compiled backend that serves the device; the cpu backend runs in float32 too. The option
--providers chooses among them. On a processor that does not multiply bfloat16, plain PyTorch is left out of the
bfloat16 cases: its products would be hundreds of times slower than in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.timing import Case, Provider
from rada_fast.bench.adapter import (
    BASELINE,
    COMPILED,
    Problem,
    call_of,
    product_type,
    providers_of,
    tolerance,
    work_of,
)
from rada_fast.config.measuring import GRID


def case_of(problem: Problem, names: list[str]) -> Case:
    """The case of a problem, for the providers with these names."""
    if COMPILED in names:
        # Each case compiles for its own sizes, so that none inherits the guards of another.
        torch.compiler.reset()

    work = work_of(problem, BASELINE)
    elements = work.bytes / torch.float32.itemsize
    return Case(
        name=str(problem),
        device=problem.device,
        providers={
            name: Provider(call_of(problem, name), tolerance(problem, name), product_type(problem, name))
            for name in names
        },
        baseline=BASELINE,
        expected=call_of(replace(problem, dtype="float32", backward=False), "reference")(),
        least_bytes=elements * getattr(torch, problem.dtype).itemsize,
        operations=work.operations,
        sizes=asdict(problem),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize(("batch", "classes"), GRID, ids=[f"B{batch}-K{classes}" for batch, classes in GRID])
def test_bench_rational_adapter(
    measured: Callable[[Case], None],
    device: str,
    chosen_providers: list[str] | None,
    batch: int,
    classes: int,
    preset: str,
    dtype: str,
    backward: bool,
) -> None:
    problem = Problem(batch, classes, preset, dtype, backward, device=device)
    names = [name for name in providers_of(problem) if chosen_providers is None or name in chosen_providers]
    measured(case_of(problem, names))
