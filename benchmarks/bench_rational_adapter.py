"""The adapter's forward and training step on features, each backend against the literal baseline.

Operations of one forward by exact arithmetic, per image: F_min = 8 K D^2 + 6 K^2 D; a step counts 3.5 F_min.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from rada_fast.config import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import BACKENDS, backends, use_backend

WIDTH = 512
# One image with few and many classes, and the six kept views of test-time training.
SHAPES = [(1, 50), (1, 500), (6, 200)]
USABLE = [name for name in BACKENDS if backends()[name] == "usable"]


def make_step(batch: int, classes: int, preset: str, *, backward: bool) -> Callable[[], torch.Tensor]:
    """A call that gives the logits, after a backward pass too if asked; its inputs are the same for every backend."""
    torch.manual_seed(0)
    config = AdapterConfig.official(WIDTH) if preset == "official" else AdapterConfig.paper(WIDTH)
    adapter = RationalAdapter(config)
    for name, parameter in adapter.named_parameters():
        if name.startswith("out_proj"):
            torch.nn.init.normal_(parameter, std=0.02)
    image, text = (normalize(torch.randn(rows, WIDTH), dim=-1) for rows in (batch, classes))
    labels = torch.arange(batch) % classes

    def step() -> torch.Tensor:
        logits, penalty = adapter(image, text, 100.0, penalty="l2")
        if backward:
            adapter.zero_grad()
            (cross_entropy(logits, labels) + 1.5 * penalty).backward()
        return logits.detach()

    return step


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("batch", "classes"), SHAPES, ids=[f"B{batch}-K{classes}" for batch, classes in SHAPES])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_bench_rational_adapter(
    benchmark: Callable[..., torch.Tensor], preset: str, batch: int, classes: int, backward: bool, backend: str
) -> None:
    benchmark.group = f"{preset} B={batch} K={classes} {'forward+backward' if backward else 'forward'}"  # type: ignore[attr-defined]
    step = make_step(batch, classes, preset, backward=backward)
    with use_backend("reference"):
        expected = step()
    with use_backend(backend):
        # Right first: the two differ by float32 rounding of scores that grow with s^2.
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-2)
        benchmark(step)
