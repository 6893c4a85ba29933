"""View selection against the same equation in plain PyTorch, forward only.

At the least, the logits must be read once, and entropies and indices written.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Case, Provider
from rada_fast.ops import select_views, use_backend

VIEWS, COUNT = 64, 6


def plain(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return entropies.argsort(dim=-1, stable=True)[:, :COUNT]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [200, 1000])
@pytest.mark.parametrize("episodes", [1, 8, 64])
def test_bench_view_selection(
    measured: Callable[[Case], None], compiled_device: str, episodes: int, classes: int, dtype: str
) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(episodes, VIEWS, classes, device=compiled_device)).to(getattr(torch, dtype))

    def compiled() -> Tensor:
        with use_backend(compiled_device):
            return select_views(logits, COUNT)

    measured(
        Case(
            name=f"select views E={episodes} K={classes} {dtype} {compiled_device}",
            device=compiled_device,
            providers={"pytorch": Provider(lambda: plain(logits), 0), "rada_fast": Provider(compiled, 0)},
            baseline="pytorch",
            expected=plain(logits),
            least_bytes=logits.nbytes + episodes * (VIEWS * 4 + COUNT * 8),
        )
    )
