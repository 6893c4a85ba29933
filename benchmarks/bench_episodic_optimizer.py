"""One optimiser step of E adapters: ours against torch.optim's foreach and fused forms and a plain pass over memory.

The floor is a read-modify-write in place (x *= c) of as many bytes as a later step moves: p, m, v and the gradient in,
p, m and v out. Ours at the first step, from a reset, and with PyTorch's own square roots are providers of their own.
Their first answers are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.ops import EpisodicOptimizer
from rada_fast.ops.rational_adapter import parameter_shapes

from . import interleaved

FLOOR = "read-modify-write"
BYTES = 4 * (4 + 3)
"""Of an element in a later step: p, m, v, g read, p, m, v written, float32."""
LR, DECAY = 8e-4, 0.01

Step = Callable[[], None]


def providers(episodes: int, device: str) -> tuple[dict[str, Step], int]:
    """A step of each provider, and the elements of all adapters."""
    torch.manual_seed(0)
    shapes = parameter_shapes(AdapterConfig.official(512))
    initial = {name: 0.02 * torch.randn(shape, device=device) for name, shape in shapes.items()}
    gradients: dict[str, Tensor | None] = {
        name: 0.01 * torch.randn(episodes, *shape, device=device) for name, shape in shapes.items()
    }
    # What test-time training's first step really is: the output projection alone has a gradient.
    sparse = {name: value if name.startswith("out_proj") else None for name, value in gradients.items()}
    elements = episodes * sum(value.numel() for value in initial.values())

    def ours(*, torch_roots: bool = False) -> EpisodicOptimizer:
        return EpisodicOptimizer(initial, episodes, lr=LR, weight_decay=DECAY, torch_roots=torch_roots)

    def theirs(form: str) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        parameters = [value.expand(episodes, *value.shape).clone() for value in initial.values()]
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, **{form: True}), parameters

    later, rooted, first, started = ours(), ours(torch_roots=True), ours(), ours()
    (foreach, found), (fused, _) = theirs("foreach"), theirs("fused")
    for _ in range(2):
        later.step(gradients)
        foreach.step()
    for value, expected in zip(later.parameters.values(), found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    fused.step()
    rooted.step(gradients)
    buffer = torch.ones(elements * BYTES // 8, device=device)

    def from_reset(optimizer: EpisodicOptimizer, given: dict[str, Tensor | None]) -> None:
        optimizer.reset()
        optimizer.step(given)

    def floor() -> None:
        buffer.mul_(1.0000001)

    steps: dict[str, Step] = {
        FLOOR: floor,
        "ours, later step": lambda: later.step(gradients),
        "ours, PyTorch's roots": lambda: rooted.step(gradients),
        "ours, first step": lambda: from_reset(first, gradients),
        "ours, first step of TTT": lambda: from_reset(started, sparse),
        "torch.optim fused": lambda: fused.step() and None,
        "torch.optim foreach": lambda: foreach.step() and None,
    }
    return steps, elements


@pytest.mark.parametrize("episodes", [1, 8, 64])
def test_bench_episodic_optimizer(
    benchmark: Any, episodes: int, compiled_device: str, small_rows: list[dict[str, Any]]
) -> None:
    steps, elements = providers(episodes, compiled_device)
    found = benchmark.pedantic(
        interleaved.measure,
        args=(f"AdamW step E={episodes} {compiled_device}", steps, FLOOR),
        kwargs={"least_bytes": elements * BYTES, "device": compiled_device},
        rounds=1,
    )
    benchmark.extra_info["providers"] = found
    small_rows.extend(found)
