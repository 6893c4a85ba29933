"""The CUDA kernels of AugMix equal Pillow in the simulator and the CPU's views on a device, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rada_fast.extension import libraries
from rada_fast.ops import AugmixPlan, augmix, random_augmix, use_backend, whole_view
from rada_fast.reference import augmix as reference
from tests.cuda.conftest import Launchers
from tests.cuda.test_multi_view_crops import TYPES, frames_of
from tests.ops.test_augmix import MEAN, STD, one_chain, picture

INVALID_VALUE = 1
"""cudaErrorInvalidValue."""


def run(
    launchers: Launchers, pixels: Tensor, plan: AugmixPlan, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Any]]:
    """Return the views and the counts of the launches. Views that a launch does not write stay NaN."""
    library = launchers("augmix.cu")
    import ptxsim

    library.register(pixels)
    count, chains, depth = plan.operations.shape
    out = torch.full((count, 3, size, size), torch.nan, dtype=dtype)
    needed = library.call("rada_fast_augmix_scratch", count, chains, depth, size)
    # Aligned to 256 bytes, as PyTorch's device memory is.
    memory = np.empty(needed + 256, np.uint8)
    start = -memory.ctypes.data % 256
    library.log.clear()
    status = library.call(
        "rada_fast_augmix", frames_of([pixels], plan.views).view(np.uint8), count, size, chains, depth,
        plan.operations, plan.matrices, plan.weights, np.float32(MEAN), np.float32(STD), TYPES[dtype],
        ptxsim.Empty(memory[start : start + needed]), ptxsim.Empty(out), None,
    )  # fmt: skip
    assert status == 0
    return out, list(library.log)


def assert_pillows(launchers: Launchers, pixels: Tensor, plan: AugmixPlan, size: int) -> None:
    made, _ = run(launchers, pixels, plan, size)
    assert torch.equal(made, reference.augmix([pixels], *plan, size, MEAN, STD))


@pytest.mark.parametrize(("shape", "size"), [((1, 1), 3), ((37, 50), 33), ((300, 20), 8)])
def test_drawn_views_are_pillows(launchers: Launchers, shape: tuple[int, int], size: int) -> None:
    # With the plain view first, which takes no part in the mix.
    plan = random_augmix(*shape, size, 4, torch.Generator().manual_seed(1)).with_plain(whole_view(*shape, size))
    assert_pillows(launchers, picture(*shape), plan, size)


# Ten values are stretched to numbers that are whole or just below, depending on every rounding; one value is not.
@pytest.mark.parametrize(("low", "high"), [(0, 256), (90, 100), (200, 201)])
def test_operations_on_values(launchers: Launchers, low: int, high: int) -> None:
    pixels = picture(24, 24, low=low, high=high)
    steps = {1: [0.0], 2: [0.0], 3: [3.0], 4: [100.0]}
    plans = [one_chain(pixels, 24, (a, steps[a]), (b, steps[b])) for a in steps for b in steps]
    assert_pillows(launchers, pixels, AugmixPlan(*(torch.cat(parts) for parts in zip(*plans, strict=True))), 24)


def test_affine_transforms(launchers: Launchers) -> None:
    # More pixels than a block has threads, so that what one transform writes and the next one reads shows.
    size = 24
    pixels = picture(size, size)
    matrices = [
        [1.0, 0.03, 0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, -7.0, -0.03, 1.0, 40.0],
        [0.3, 1.7, -3.0, -2.0, 0.1, 30.0],
        reference._rotation(-2.0, size),
        # The first pixels are read at the very borders of the picture, and then the last ones, which are outside.
        [1.0, 0.0, -0.5, 0.0, 1.0, -0.5],
        [1.0, 0.0, 0.5, 0.0, 1.0, 0.5],
    ]
    # Noise of the whole range stays as it is when its contrast is stretched, but not when it is solarised.
    steps = [[(1, [0.0]), (4, [100.0]), (5, matrix), (5, matrix), (2, [0.0])] for matrix in matrices]
    plans = [one_chain(pixels, size, *chain) for chain in steps]
    assert_pillows(launchers, pixels, AugmixPlan(*(torch.cat(parts) for parts in zip(*plans, strict=True))), size)


@pytest.mark.parametrize(("views", "depth"), [(48, 10), (56, 9), (57, 9)])
def test_as_many_views_and_words_as_one_launch_takes_and_more(launchers: Launchers, views: int, depth: int) -> None:
    # A launch resizes 56 views. It takes 480 operations or values of matrices, of which there are 480 and more. Of each
    # view's operations the last is the one that does something.
    plan = random_augmix(5, 6, 2, views, torch.Generator().manual_seed(0))
    operations = torch.zeros(views, 1, depth, dtype=torch.int64)
    matrices = torch.zeros(views, 1, depth, 6, dtype=torch.float64)
    operations[:, :, -1] = 4
    matrices[:, :, -1, 0] = torch.arange(views)[:, None] * 4
    weights = plan.weights[:, -3:].contiguous()
    assert_pillows(launchers, picture(5, 6), AugmixPlan(plan.views, operations, matrices, weights), 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_what_the_mix_writes(launchers: Launchers, dtype: torch.dtype) -> None:
    pixels = picture(16, 16)
    plan = random_augmix(16, 16, 32, 2, torch.Generator().manual_seed(0))
    made, log = run(launchers, pixels, plan, 32, dtype)
    assert torch.equal(made, reference.augmix([pixels], *plan, 32, MEAN, STD, dtype))
    # Three uploads of the plan, one launch each to resize, to run the chains and to mix.
    assert len(log) == 6
    assert log[-1].efficiency("st") >= 0.9
    assert log[-1].global_st["bytes"] == log[-1].footprint_st == made.nbytes


def test_no_views_chains_or_steps_are_served(launchers: Launchers) -> None:
    pixels = picture(9, 12)
    plan = random_augmix(9, 12, 8, 3, torch.Generator().manual_seed(2))
    made, log = run(launchers, pixels, AugmixPlan(*(part[:0] for part in plan)), 8)
    assert (made.shape, log) == ((0, 3, 8, 8), [])
    for chains, depth in ((0, 3), (3, 0), (0, 0)):
        shares = torch.tensor([[0.5] * (chains + 2), [0.0] * chains + [1.0, 0.0], [0.25] * (chains + 2)])
        operations, matrices = (part[:, :chains, :depth].contiguous() for part in (plan.operations, plan.matrices))
        less = AugmixPlan(plan.views, operations, matrices, shares)
        assert_pillows(launchers, pixels, less, 8)


def test_more_views_than_a_grid_holds_are_refused(launchers: Launchers) -> None:
    library = launchers("augmix.cu")
    for count, size in ((65536, 8), (1, 16385)):
        library.log.clear()
        # Nothing is read before the check.
        status = library.call("rada_fast_augmix", None, count, size, 3, 3, *[None] * 5, 0, *[None] * 3)
        assert (status, len(library.log)) == (INVALID_VALUE, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_a_device_makes_the_cpus_views(dtype: torch.dtype) -> None:
    if reason := libraries.load_cuda():
        pytest.skip(reason)
    pixels = picture(375, 500)
    plan = random_augmix(375, 500, 224, 63, torch.Generator().manual_seed(0)).with_plain(whole_view(375, 500, 224))
    with use_backend("cuda"):
        made = augmix([pixels.cuda()], plan, 224, MEAN, STD, dtype=dtype)
    assert made.is_cuda
    assert torch.equal(made.cpu(), augmix([pixels], plan, 224, MEAN, STD, dtype=dtype, backend="reference"))
