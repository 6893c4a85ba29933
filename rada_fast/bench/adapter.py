"""Measure the adapter by itself, forward and in a training step, beside the published arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast import _env
from rada_fast.bench import costs
from rada_fast.bench.report import sizes_name
from rada_fast.bench.stages import Figure, Ratio, Setting, Stage, counted_operations, measure, relative_error
from rada_fast.config.bench import BenchAdapterOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends, use_backend

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
    """Describe one size of the adapter: B images, K classes, width D, preset, type, with or without a backward pass."""

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
        """Return the configuration of the adapter."""
        return (AdapterConfig.official if self.preset == "official" else AdapterConfig.paper)(self.width)

    @property
    def multiplies(self) -> bool:
        """Return whether the device has products of the type."""
        return self.device != "cpu" or _env.has_native_products(self.dtype)


def providers_of(problem: Problem) -> list[str]:
    """Return the names of all providers that can solve a problem here, the baseline first if its memory suffices."""
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
    """Return a function that computes the logits, with a backward pass if the problem has one, on inputs that are drawn
    with a fixed seed.
    """
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


def figures(options: BenchAdapterOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each size and pass. Raises UserError naming a backend that cannot be used."""
    for batch, classes in options.sizes:
        for one in options.passes:
            problem = Problem(
                batch, classes, options.preset, options.precision, one == "step", options.embed_dim, device.type
            )
            names = chosen_providers(problem, options.backend)
            yield measure(setting_of(problem, names), device.type, options.measuring)


def chosen_providers(problem: Problem, asked: tuple[str, ...]) -> list[str]:
    """Return the providers to measure: those that were asked for, or all that can solve the problem here.

    What must be compiled first, for each size and pass anew, is measured where it was asked for only.
    """
    usable = providers_of(problem)
    for name in asked:
        if name not in usable:
            reason = backends().get(name, "usable")
            if reason == "usable":
                reason = f"it does not serve {problem}"
            raise UserError(f"backend {name!r} cannot be measured: {reason}; usable here: {', '.join(usable)}")
    return list(dict.fromkeys(asked)) or [name for name in usable if name != COMPILED]


def setting_of(problem: Problem, names: list[str]) -> Setting:
    """Return the setting of a problem with these providers. Every answer is compared before anything is timed."""
    if COMPILED in names:
        # Each problem compiles for its own sizes, so that none inherits the guards of another.
        torch.compiler.reset()
    expected = call_of(replace(problem, dtype="float32", backward=False), "reference")()
    calls = {name: call_of(problem, name) for name in names}
    for name, call in calls.items():
        error, allowed = relative_error(call(), expected), tolerance(problem, name)
        if not error <= allowed:
            raise RuntimeError(f"{name} on {problem}: relative error {error:.1e} > {allowed:.0e}")
    sizes = {
        "batch": problem.batch, "classes": problem.classes, "embed_dim": problem.width, "precision": problem.dtype
    }  # fmt: skip
    passes = "forward and backward with the mask penalty" if problem.backward else "forward"
    stages = tuple(
        Stage(
            name=name,
            inside=f"{passes}: {DESCRIPTIONS[name]}",
            call=call,
            pictures=problem.batch,
            work=(work_of(problem, name),),
            operations=operations_of(problem) if name == "reference" else None,
        )
        for name, call in calls.items()
    )
    baseline = next((name for name in (BASELINE, "reference") if name in names), None)
    ratios = [
        Ratio(f"{name} speed-up", baseline, (name,), f"time of {baseline} / time of {name}")
        for name in names
        if baseline is not None and name != baseline
    ]
    return Setting(
        name=f"{sizes_name(sizes)}, {'step' if problem.backward else 'forward'}",
        sizes=sizes,
        stages=stages,
        ratios=tuple(ratios),
    )


DESCRIPTIONS = {
    BASELINE: "the published arithmetic, step by step, in float32",
    "reference": "plain PyTorch",
    COMPILED: "torch.compile of plain PyTorch",
    CPU_FLOAT32: "the fused C++ operator in float32",
    "cpu": "the fused C++ operator",
    "triton": "the Triton kernels",
}


def product_type(problem: Problem, name: str) -> str:
    """Return the type in which a provider multiplies."""
    in_float32 = problem.dtype == "float32" or name in FLOAT32_ONLY
    return "float32" if in_float32 or not problem.multiplies else problem.dtype


def tolerance(problem: Problem, name: str) -> float:
    """Return how large the relative error of a provider may be."""
    # bfloat16 keeps 8 bits of a number, so logits agree to about a hundredth of their norm.
    return 1e-4 if problem.dtype == "float32" or name in FLOAT32_ONLY else 5e-2


def work_of(problem: Problem, name: str) -> costs.Work:
    """Return the least work of a problem, in the type in which a provider multiplies."""
    work = costs.step_work if problem.backward else costs.forward_work
    return work(problem.config, problem.batch, problem.classes, dtype=product_type(problem, name))


def operations_of(problem: Problem) -> float:
    """Return the operations of the reference as PyTorch's counter finds them."""
    return counted_operations(call_of(replace(problem, device="meta"), "reference"))
