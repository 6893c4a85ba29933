"""The Triton backend is as exact as plain PyTorch in calls that are drawn at random."""

from __future__ import annotations

import pytest
import torch

from tests.drawn_calls import assert_drawn_call_is_right, draw, solve_drawn

from .conftest import Simulated


# The output projection is zero in 84 and 133, whose gradients have strides, and 1, 4 and 6 take earlier projections.
# In 26 the episodes share the output's weight, but not its bias, and in 4 its bias, but not its weight.
@pytest.mark.parametrize(("layers", "seed"), [*((1, seed) for seed in (1, 4, 6, 8, 10, 26, 84, 133)), (2, 1), (2, 4)])
def test_a_drawn_call(layers: int, seed: int, simulated: Simulated) -> None:
    dtypes, widths = [torch.float32, torch.bfloat16, torch.float16], [(32, 1), (32, 2), (64, 2), (96, 4)]
    call = draw(seed, dtypes, widths, 40, layers=layers)
    with simulated():
        fast = solve_drawn(call, call.dtype, "triton")
    assert_drawn_call_is_right(call, fast)
