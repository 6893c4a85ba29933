"""One optimiser step of E adapters: ours against the forms "foreach" and "fused" of torch.optim.

The baseline is a read-modify-write in place (x *= c) of as many bytes as a later step moves. Our first step, starting
from a reset, and our step with PyTorch's own square roots are providers of their own. A step changes its parameters, so
the answers are compared after the first two steps, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Case, Provider
from rada_fast.bench import costs
from rada_fast.config.method import AdapterConfig
from rada_fast.ops import EpisodicOptimizer
from rada_fast.ops.rational_adapter import parameter_shapes

MEMORY_PASS = "read-modify-write"
LR, DECAY = 8e-4, 0.01


def calls(episodes: int, device: str) -> tuple[dict[str, Callable[[], object]], int]:
    """One step of each provider, and the bytes of all adapters' parameters."""
    torch.manual_seed(0)
    shapes = parameter_shapes(AdapterConfig.official(512))
    initial = {name: 0.02 * torch.randn(shape, device=device) for name, shape in shapes.items()}
    gradients: dict[str, Tensor | None] = {
        name: 0.01 * torch.randn(episodes, *shape, device=device) for name, shape in shapes.items()
    }
    # In the first step of test-time training only the output projection has a gradient.
    sparse = {name: value if name.startswith("out_proj") else None for name, value in gradients.items()}
    parameter_bytes = episodes * sum(value.nbytes for value in initial.values())

    def ours(*, torch_roots: bool = False) -> EpisodicOptimizer:
        return EpisodicOptimizer(initial, episodes, lr=LR, weight_decay=DECAY, torch_roots=torch_roots)

    def theirs(form: str) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        parameters = [value.expand(episodes, *value.shape).clone() for value in initial.values()]
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient
        return torch.optim.AdamW(
            parameters, lr=LR, weight_decay=DECAY, foreach=form == "foreach", fused=form == "fused"
        ), parameters

    later, rooted, first, started = ours(), ours(torch_roots=True), ours(), ours()
    (foreach, found), (fused, _) = theirs("foreach"), theirs("fused")
    for _ in range(2):
        later.step(gradients)
        foreach.step()
    for value, expected in zip(later.parameters.values(), found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    fused.step()
    rooted.step(gradients)
    # Every byte of it is read and written.
    buffer = torch.ones(costs.OPTIMIZER_PASSES * parameter_bytes // 8, device=device)

    def from_reset(optimizer: EpisodicOptimizer, given: dict[str, Tensor | None]) -> None:
        optimizer.reset()
        optimizer.step(given)

    def memory_pass() -> None:
        buffer.mul_(1.0000001)

    steps: dict[str, Callable[[], object]] = {
        MEMORY_PASS: memory_pass,
        "ours, later step": lambda: later.step(gradients),
        "ours, PyTorch's roots": lambda: rooted.step(gradients),
        "ours, first step": lambda: from_reset(first, gradients),
        "ours, first step of TTT": lambda: from_reset(started, sparse),
        "torch.optim fused": fused.step,
        "torch.optim foreach": foreach.step,
    }
    return steps, parameter_bytes


@pytest.mark.parametrize("episodes", [1, 8, 64])
def test_bench_episodic_optimizer(measured: Callable[[Case], None], compiled_device: str, episodes: int) -> None:
    steps, parameter_bytes = calls(episodes, compiled_device)
    measured(
        Case(
            name=f"AdamW step E={episodes} {compiled_device}",
            device=compiled_device,
            providers={name: Provider(step, tolerance=None) for name, step in steps.items()},
            baseline=MEMORY_PASS,
            least_bytes=costs.OPTIMIZER_PASSES * parameter_bytes,
        )
    )
