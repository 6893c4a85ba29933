"""Test-time training on features: E episodes of 64 views, the paper's three steps, against plain PyTorch throughout.

Least to be moved: the views, and of every step the parameters, their gradients and AdamW's moments, as in
bench_episodic_optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast import AdapterConfig, EpisodeConfig, RationalAdapter, adapt_episodes, use_backend

from . import interleaved

VIEWS, WIDTH = 64, 512


@pytest.mark.parametrize("classes", [200, 1000])
@pytest.mark.parametrize("episodes", [1, 4])
def test_bench_episodes(
    benchmark: Any, episodes: int, classes: int, device: str, small_rows: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    adapter = RationalAdapter(AdapterConfig.official(WIDTH)).to(device)
    views, text = (
        normalize(torch.randn(*shape), dim=-1).to(device) for shape in ((episodes, VIEWS, WIDTH), (classes, WIDTH))
    )

    def run(backend: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with use_backend(backend):
                return adapt_episodes(adapter, views, text, 100.0)

        return step

    steps = {"pytorch": run("reference"), "rada_fast": run("auto")}
    expected, found = steps["pytorch"](), steps["rada_fast"]()
    # AdamW's first steps are signs: where a gradient is nearly zero its rounding decides.
    assert float((found - expected).norm() / expected.norm()) <= 1e-2
    parameters = sum(parameter.nbytes for parameter in adapter.parameters())
    case = f"episodes E={episodes} K={classes} {device}"
    measured = benchmark.pedantic(
        interleaved.measure,
        args=(case, steps, "pytorch"),
        kwargs={"least_bytes": views.nbytes + episodes * EpisodeConfig().steps * 7 * parameters, "device": device},
        rounds=1,
    )
    benchmark.extra_info["providers"] = measured
    small_rows.extend(measured)
