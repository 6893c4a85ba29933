"""The whole adapter, forward alone and forward with backward.

The providers are the literal float32 baseline, which is the published code's arithmetic, the reference, torch.compile
of the reference, and every compiled backend that serves the device; the cpu backend runs in float32 too. The option
--providers chooses among them. On a processor that does not multiply bfloat16, plain PyTorch is left out of the
bfloat16 cases: its products would be hundreds of times slower than in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks import costs
from benchmarks.timing import Case, Provider
from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends, use_backend

SHAPES = [(1, 50), (1, 500), (6, 200), (6, 1000), (64, 100), (32, 1000)]
MAX_BASELINE_BYTES = 8 * 2**30
"""The literal baseline is left out where it would need more memory."""
BASELINE = "literal"
COMPILED = "compile"
"""The provider that is torch.compile of the reference."""
CPU_FLOAT32 = "cpu-float32"
"""The provider that is the cpu backend in float32, whatever type the case has."""
FLOAT32_ONLY = (BASELINE, CPU_FLOAT32)


@dataclass(frozen=True)
class Problem:
    """One size of the adapter: images B, classes K, width D, preset, type, with or without the backward pass."""

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
    def config(self) -> AdapterConfig:
        return (AdapterConfig.official if self.preset == "official" else AdapterConfig.paper)(self.width)

    @property
    def multiplies(self) -> bool:
        """Whether the device has products of the type."""
        return self.device != "cpu" or _env.has_native_products(self.dtype)


def providers_of(problem: Problem) -> list[str]:
    """The names of all providers that can solve a problem here; the baseline comes first if its memory suffices."""
    literal = costs.literal_bytes(problem.config, problem.batch, problem.classes)
    names = [BASELINE] if literal <= MAX_BASELINE_BYTES else []
    if problem.multiplies:
        names += ["reference", COMPILED]
    serving = ("cpu",) if problem.device == "cpu" else ("triton",)
    compiled = [name for name in serving if backends()[name] == "usable"]
    if "cpu" in compiled and problem.dtype != "float32":
        names.append(CPU_FLOAT32)
    return names + compiled


def call_of(problem: Problem, provider: str) -> Callable[[], Tensor]:
    """A function that returns the logits, after a backward pass if the problem has one. All get the same inputs."""
    torch.manual_seed(0)
    dtype = torch.float32 if provider in FLOAT32_ONLY else getattr(torch, problem.dtype)
    adapter = RationalAdapter(problem.config)
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.02)
    image, text = (
        normalize(torch.randn(rows, problem.width), dim=-1).to(dtype) for rows in (problem.batch, problem.classes)
    )
    labels = torch.arange(problem.batch) % problem.classes
    labels, image, text = (value.to(problem.device) for value in (labels, image, text))
    adapter = adapter.to(problem.device, dtype)
    forward: Any = torch.compile(adapter, fullgraph=True, dynamic=False) if provider == COMPILED else adapter

    def call() -> Tensor:
        with use_backend({COMPILED: "reference", CPU_FLOAT32: "cpu"}.get(provider, provider)):
            if not problem.backward:
                with torch.no_grad():
                    logits: Tensor = forward(image, text, 100.0)
                return logits
            logits, penalty = forward(image, text, 100.0, penalty="l2")
            adapter.zero_grad()
            (cross_entropy(logits.float(), labels) + 1.5 * penalty).backward()
            return logits.detach()

    return call


def case_of(problem: Problem, names: list[str]) -> Case:
    """The case of a problem, for the providers with these names."""
    if COMPILED in names:
        # Each case compiles for its own sizes, so that none inherits the guards of another.
        torch.compiler.reset()

    def provider(name: str) -> Provider:
        in_float32 = problem.dtype == "float32" or name in FLOAT32_ONLY
        # bfloat16 keeps 8 bits of a number, so logits agree to about a hundredth of their norm.
        tolerance = 1e-4 if in_float32 else 5e-2
        dtype = "float32" if in_float32 or not problem.multiplies else problem.dtype
        return Provider(call_of(problem, name), tolerance, dtype)

    elements = costs.step_elements(problem.config, problem.batch, problem.classes, backward=problem.backward)
    operations = costs.least_operations(problem.batch, problem.classes, problem.width)
    return Case(
        name=str(problem),
        device=problem.device,
        providers={name: provider(name) for name in names},
        baseline=BASELINE,
        expected=call_of(replace(problem, dtype="float32", backward=False), "reference")(),
        least_bytes=elements * getattr(torch, problem.dtype).itemsize,
        operations=operations * (1 + costs.BACKWARD if problem.backward else 1),
        sizes=asdict(problem),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES, ids=[f"B{batch}-K{classes}" for batch, classes in SHAPES])
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
