"""The Triton backend is as exact as plain PyTorch in calls that are drawn at random."""

from __future__ import annotations

import pytest
import torch

from tests.drawn_calls import assert_drawn_call_is_right, draw, solve_drawn

from .conftest import Simulated


# The output projection is zero in 4 and 67, and 1, 8 and 14 take earlier projections.
@pytest.mark.parametrize(("layers", "seed"), [*((1, seed) for seed in (1, 2, 4, 6, 8, 10, 14, 67)), (2, 1), (2, 4)])
def test_a_drawn_call(layers: int, seed: int, simulated: Simulated) -> None:
    dtypes, widths = [torch.float32, torch.bfloat16, torch.float16], [(32, 1), (32, 2), (64, 2), (96, 4)]
    call = draw(seed, dtypes, widths, 40, layers=layers)
    with simulated():
        fast = solve_drawn(call, call.dtype, "triton")
    assert_drawn_call_is_right(call, fast)
