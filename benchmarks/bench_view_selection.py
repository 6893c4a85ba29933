"""View selection against its form in plain PyTorch, forward only: the logits read once are the least to be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rada_fast.ops import select_views, use_backend

from . import interleaved

VIEWS, COUNT = 64, 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [200, 1000])
@pytest.mark.parametrize("episodes", [1, 8, 64])
def test_bench_view_selection(
    benchmark: Any,
    episodes: int,
    classes: int,
    dtype: torch.dtype,
    small_rows: list[dict[str, Any]],
    compiled_device: str,
) -> None:
    device = compiled_device
    torch.manual_seed(0)
    logits = (10 * torch.randn(episodes, VIEWS, classes, device=device)).to(dtype)

    def plain() -> torch.Tensor:
        log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
        entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        return entropies.argsort(dim=-1, stable=True)[:, :COUNT]

    def compiled() -> torch.Tensor:
        with use_backend(device):
            return select_views(logits, COUNT)

    assert torch.equal(plain(), compiled())
    steps: dict[str, Callable[[], Any]] = {"pytorch": plain, "rada_fast": compiled}
    least = logits.nbytes + episodes * (VIEWS * 4 + COUNT * 8)
    case = f"select views E={episodes} K={classes} {str(dtype).removeprefix('torch.')} {device}"
    found = benchmark.pedantic(
        interleaved.measure, args=(case, steps, "pytorch"), kwargs={"least_bytes": least, "device": device}
    )
    benchmark.extra_info["providers"] = found
    small_rows.extend(found)
