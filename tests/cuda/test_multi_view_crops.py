"""The CUDA kernel of views equals Pillow in the simulator and the CPU's views on a device, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rada_fast.extension import libraries
from rada_fast.ops import multi_view_crops, random_views, use_backend, whole_view
from rada_fast.ops._views import TALL_FIRST
from rada_fast.reference import multi_view_crops as reference
from tests.cuda.conftest import Launchers
from tests.ops.test_multi_view_crops import MEAN, STD, picture, view

TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
FRAME = np.dtype(
    [("pixels", "u8"), *((f"{name}_stride", "i8") for name in ("row", "column", "channel"))]
    + [
        (name, "i4")
        for name in ("height", "width", "resized_height", "resized_width", "top", "left", "flags", "unused")
    ]
)


def frames_of(pictures: Sequence[Tensor], views: Tensor) -> np.ndarray[Any, Any]:
    """Compute the launcher's frames from a table of views, as the registered operator does."""
    frames = []
    for row in views.tolist():
        index, top, left, height, width, resized_height, resized_width, *window, flip, bicubic = row
        pixels = pictures[index][top:, left:]
        shrinks = height - resized_height
        vertical_first = TALL_FIRST and shrinks > 0 and shrinks > 2 * (width - resized_width)
        flags = flip + 2 * bicubic + 4 * vertical_first
        sides = (height, width, resized_height, resized_width)
        frames.append((pixels.data_ptr(), *pixels.stride(), *sides, *window, flags, 0))
    return np.array(frames, FRAME)


def run(
    launchers: Launchers, pictures: Sequence[Tensor], views: Tensor, size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any]:
    """The views and the launches' counts; what is not written shows."""
    library = launchers("multi_view_crops.cu")
    import ptxsim

    for pixels in pictures:
        library.register(pixels)
    out = torch.full((len(views), 3, size, size), torch.nan, dtype=dtype)
    frames, mean, std = frames_of(pictures, views), np.float32(MEAN), np.float32(STD)
    library.log.clear()
    status = library.call(
        "rada_fast_multi_view_crops", frames.view(np.uint8), len(views), size, mean, std, TYPES[dtype],
        ptxsim.Empty(out), None,
    )  # fmt: skip
    assert status == 0
    return out, list(library.log)


@pytest.mark.parametrize("bicubic", [0, 1])
@pytest.mark.parametrize(
    ("shape", "size"),
    # One pixel; tails of the tile; more taps than a table holds, either way; both orders of the passes.
    [((1, 1), 5), ((37, 50), 33), ((1, 4000), 3), ((4000, 1), 3), ((90, 31), 34), ((300, 20), 8), ((20, 300), 8)],
)
def test_views_are_pillows(launchers: Launchers, shape: tuple[int, int], size: int, bicubic: int) -> None:
    pixels = picture(*shape)
    views = torch.cat([view(pixels, size, bicubic=bicubic, flip=1), whole_view(*shape, size)])
    made, log = run(launchers, [pixels], views, size)
    assert torch.equal(made, reference.multi_view_crops([pixels], views, size, MEAN, STD))
    assert len(log) == 1


@pytest.mark.parametrize("dtype", TYPES)
def test_pictures_of_differing_sizes_and_strides(launchers: Launchers, dtype: torch.dtype) -> None:
    pictures = [picture(31, 47, 1), picture(20, 60, 2), picture(40, 9, 3)]
    pictures[0] = pictures[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    pictures[1] = pictures[1][:, ::2]
    tables = []
    for index, pixels in enumerate(pictures):
        drawn = random_views(*pixels.shape[:2], 20, 2, torch.Generator().manual_seed(index))
        drawn[:, 0] = index
        tables.append(drawn)
    views = torch.cat(tables)[torch.randperm(6)]
    made, _ = run(launchers, pictures, views, 20, dtype)
    assert torch.equal(made, reference.multi_view_crops(pictures, views, 20, MEAN, STD, dtype))


@pytest.mark.parametrize(("count", "launches"), [(56, 1), (57, 2)])
def test_as_many_views_as_one_launch_takes_and_more(launchers: Launchers, count: int, launches: int) -> None:
    pixels = picture(5, 6)
    views = random_views(5, 6, 2, count, torch.Generator().manual_seed(0))
    made, log = run(launchers, [pixels], views, 2)
    assert torch.equal(made, reference.multi_view_crops([pixels], views, 2, MEAN, STD))
    assert len(log) == launches


def test_what_a_launch_moves(launchers: Launchers) -> None:
    pixels = picture(40, 60)
    views = random_views(40, 60, 64, 2, torch.Generator().manual_seed(0))
    _, (stats,) = run(launchers, [pixels], views, 64)
    # Every output is written once, in whole sectors; the pictures' pixels are gathered.
    assert stats.efficiency("st") >= 0.9
    assert stats.global_st["bytes"] == stats.footprint_st == 2 * 3 * 64 * 64 * 4


def test_no_views_launch_nothing(launchers: Launchers) -> None:
    none = torch.empty((0, 11), dtype=torch.int64)
    for pictures in ([], [picture(9, 9)]):
        made, log = run(launchers, pictures, none, 8)
        assert (made.shape, log) == ((0, 3, 8, 8), [])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_a_device_makes_the_cpus_views(dtype: torch.dtype) -> None:
    if reason := libraries.load_cuda():
        pytest.skip(reason)
    pictures = [picture(375, 500), picture(30, 4000), picture(900, 40)]
    tables = []
    for index, pixels in enumerate(pictures):
        drawn = random_views(*pixels.shape[:2], 224, 30, torch.Generator().manual_seed(index))
        drawn = torch.cat([drawn, whole_view(*pixels.shape[:2], 224)])
        drawn[:, 0] = index
        tables.append(drawn)
    views = torch.cat(tables)
    with use_backend("cuda"):
        made = multi_view_crops([pixels.cuda() for pixels in pictures], views, 224, MEAN, STD, dtype=dtype)
    assert made.is_cuda
    assert torch.equal(made.cpu(), multi_view_crops(pictures, views, 224, MEAN, STD, dtype=dtype, backend="reference"))
