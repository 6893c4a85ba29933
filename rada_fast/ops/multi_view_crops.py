"""Draw views of decoded pictures, and cut them: boxes are resized as by Pillow, mirrored and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rada_fast.ops._views import (
    CROP_RATIO,
    CROP_SCALE,
    TALL_FIRST,
    check_draw,
    check_sides,
    check_views,
    cuts_compiled,
    views_are_compiled,
)


def whole_view(
    height: int,
    width: int,
    size: int,
    *,
    resize: Literal["shortest", "squash"] = "shortest",
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    resized: int | None = None,
) -> Tensor:
    """Return the view of a whole picture.

    height, width: the size of the picture, in pixels.
    size: the side S of the view.
    resize: "shortest" resizes the shorter side to S and crops the centre; "squash" resizes both sides to S.
    interpolation: the filter.
    resized: the length R >= S to which a side is resized instead of S, before the centre is cropped; None stands for S.

    Returns a table of one view, (1, 11) int64 (VIEW_COLUMNS), of picture 0. Raises ValueError for sizes below 1 or an R
    below S. Equivalent to torchvision's Resize(R) or Resize((R, R)), and CenterCrop(S).
    """
    check_sides(height, width, size)
    side = size if resized is None else resized
    if side < size:
        raise ValueError(f"resized must be at least the size {size}, got {resized}")
    resized_height = resized_width = side
    if resize == "shortest":
        # As torchvision does, round the longer side down, and the window's corner to the nearest integer, ties to even.
        long = int(side * max(height, width) / min(height, width))
        resized_height, resized_width = (long, side) if width <= height else (side, long)
    top, left = (round((length - size) / 2.0) for length in (resized_height, resized_width))
    bicubic = int(interpolation == "bicubic")
    return torch.tensor([[0, 0, 0, height, width, resized_height, resized_width, top, left, 0, bicubic]])


def random_views(
    height: int,
    width: int,
    size: int,
    count: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    backend: str | None = None,
) -> Tensor:
    """Draw boxes and flips as torchvision's RandomResizedCrop and RandomHorizontalFlip do, one view after another.

    height, width: the size of the picture, in pixels.
    size: the side S of a view.
    count: the number N of views.
    generator: a generator on the CPU; its state afterwards is the one that torchvision would leave.
    scale: the least and largest share of the picture in a box.
    ratio: the least and largest width over height of a box.

    Returns a table of views, (N, 11) int64 (VIEW_COLUMNS), of picture 0, bilinear.
    Raises ValueError for sizes below 1 or a negative count.
    """
    check_draw(height, width, size, count)
    if views_are_compiled(backend):
        drawn: Tensor = torch.ops.rada_fast.random_views(height, width, size, count, scale, ratio, generator)
        return drawn
    from rada_fast.reference import multi_view_crops as reference

    return reference.random_views(height, width, size, count, generator, scale, ratio)


def multi_view_crops(
    pictures: Sequence[Tensor],
    views: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Cut each view from its picture's pixels in one pass: out = (resize(box) / 255 - mean) / std.

    pictures: tensors (height, width, 3) uint8 of any sizes and strides, on one device.
    views: (N, 11) int64 on the CPU, one row for each view (VIEW_COLUMNS).
    size: the side S of a view.
    mean, std: three values each, one for each channel, for pixels in 0..1.
    dtype: float32, bfloat16 or float16.

    Returns (N, 3, S, S), on the pictures' device. The resize is Pillow's, antialiased and rounded to whole values after
    each of its two passes. Results in float32 equal those of PIL and torchvision bit for bit; other types round them.
    Raises ValueError where an argument has a wrong shape or type, or a view leaves its picture.
    Equivalent to Normalize(mean, std)(ToTensor()(image.crop(box).resize(...).crop(window))) of torchvision and PIL.
    """
    check_views(pictures, views, size, mean, std, dtype)
    if cuts_compiled(pictures, backend):
        crops: Tensor = torch.ops.rada_fast.multi_view_crops(
            list(pictures), views, size, list(mean), list(std), dtype, TALL_FIRST
        )
        return crops
    from rada_fast.reference import multi_view_crops as reference

    return reference.multi_view_crops(pictures, views, size, mean, std, dtype)
