"""Test-time training on features: E episodes of 64 views and the paper's three steps, against plain PyTorch throughout.

At the least, the views must be read once, and every step must move what a step of AdamW moves.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.timing import Case, Provider
from rada_fast import AdapterConfig, EpisodeConfig, RationalAdapter, adapt_episodes, use_backend
from rada_fast.bench import costs

VIEWS, WIDTH = 64, 512
TOLERANCE = 1e-2
"""The first steps of AdamW are signs of gradients, so where a gradient is nearly zero its rounding decides."""


# The last case shows how many images a second are adapted to; on a CPU it would take a minute for each round.
@pytest.mark.parametrize(("episodes", "classes"), [(1, 200), (4, 200), (1, 1000), (4, 1000), (64, 200)])
def test_bench_episodes(measured: Callable[[Case], None], device: str, episodes: int, classes: int) -> None:
    if episodes > 4 and device == "cpu":
        pytest.skip("a CPU computes one episode after the other")
    torch.manual_seed(0)
    adapter = RationalAdapter(AdapterConfig.official(WIDTH)).to(device)
    views, text = (
        normalize(torch.randn(*shape), dim=-1).to(device) for shape in ((episodes, VIEWS, WIDTH), (classes, WIDTH))
    )

    def adapted_by(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with use_backend(backend):
                return adapt_episodes(adapter, views, text, 100.0)

        return call

    plain = adapted_by("reference")
    parameters = sum(parameter.nbytes for parameter in adapter.parameters())
    measured(
        Case(
            name=f"episodes E={episodes} K={classes} {device}",
            device=device,
            providers={"pytorch": Provider(plain, TOLERANCE), "rada_fast": Provider(adapted_by("auto"), TOLERANCE)},
            baseline="pytorch",
            expected=plain(),
            least_bytes=views.nbytes + episodes * EpisodeConfig().steps * costs.OPTIMIZER_PASSES * parameters,
        )
    )
