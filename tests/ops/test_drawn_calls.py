"""The compiled CPU backend is as exact as plain PyTorch in calls that are drawn at random."""

from __future__ import annotations

import pytest
import torch

from tests.drawn_calls import assert_drawn_call_is_right, draw, solve_drawn

from .support import needs_extension


@needs_extension
@pytest.mark.parametrize("seed", range(24))
def test_a_drawn_call(seed: int) -> None:
    widths = [(30, 6), (32, 2), (35, 1), (48, 3), (64, 1), (128, 1)]
    call = draw(seed, [torch.float32, torch.bfloat16], widths, 150)
    assert_drawn_call_is_right(call, solve_drawn(call, call.dtype, "cpu"))
