"""Views of decoded pictures: boxes resized as Pillow resizes them, mirrored, normalised; and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import PIL
import torch
from torch import Tensor

from rada_fast.ops._backends import library
from rada_fast.ops._backends.choice import reference_asked, resolve_device_backend
from rada_fast.ops._backends.compiled import VIEW_COLUMNS as VIEW_COLUMNS

CROP_SCALE = (0.08, 1.0)
"""Share of the picture in a random crop, torchvision's default, which the test-time protocols use."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop, torchvision's default."""

TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Pillow from version 13 on makes the vertical pass first where the height shrinks by more than twice what the width
does. Both passes round to whole values, so the order shows; the compiled operators follow the installed Pillow."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole_view(
    height: int,
    width: int,
    size: int,
    *,
    resize: Literal["shortest", "squash"] = "shortest",
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """The view of a whole picture: its shorter side resized to size and the centre cropped, or both sides resized.

    height, width: of the picture, in pixels; size: S; resize: "shortest" or "squash"; interpolation: the filter.
    Returns a table of one view, (1, 11) int64 (VIEW_COLUMNS), of picture 0.
    Equivalent to torchvision's Resize(size) and CenterCrop(size), or Resize((size, size)).
    """
    resized_height = resized_width = size
    if resize == "shortest":
        # torchvision's rounding: the longer side down, the window's corner to the nearest even.
        long = int(size * max(height, width) / min(height, width))
        resized_height, resized_width = (long, size) if width <= height else (size, long)
    top, left = (round((side - size) / 2.0) for side in (resized_height, resized_width))
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
    """Boxes and flips, drawn as torchvision's RandomResizedCrop and RandomHorizontalFlip draw them, view after view.

    height, width: of the picture, in pixels; size: S; count: views N; generator: on the CPU, left where torchvision
    would leave it; scale: least and largest share of the picture; ratio: least and largest width over height.
    Returns a table of views, (N, 11) int64 (VIEW_COLUMNS), of picture 0, bilinear.
    Raises ValueError for sizes below 1 or a negative count.
    """
    if min(height, width, size) < 1 or count < 0:
        raise ValueError(
            f"height, width and size must be at least 1 and count at least 0, got {height}, {width}, {size} and {count}"
        )
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
    """Views of pictures, each made in one pass from its picture's pixels: out = (resize(box) / 255 - mean) / std.

    pictures: each (height, width, 3) uint8, contiguous or any stride, of any sizes; views: (N, 11) int64 on the CPU, a
    row a view (VIEW_COLUMNS); size: S; mean, std: by channel, of values in 0..1; dtype: float32, bfloat16 or float16.
    Returns (N, 3, S, S), on the pictures' device. The resize is Pillow's, with antialiasing and its rounding to whole
    values after either pass; float32 results equal PIL's and torchvision's bit for bit, the others are those rounded.
    Raises ValueError where an argument has a wrong shape or type, or a view leaves its picture.
    Equivalent to Normalize(mean, std)(ToTensor()(image.crop(box).resize(...).crop(window))) of torchvision and PIL.
    """
    check(pictures, views, size, mean, std, dtype)
    device = pictures[0].device if len(pictures) else torch.device("cpu")
    if resolve_device_backend(device, backend) in ("cpu", "cuda"):
        made: Tensor = torch.ops.rada_fast.multi_view_crops(
            list(pictures), views, size, list(mean), list(std), dtype, TALL_FIRST
        )
        return made
    from rada_fast.reference import multi_view_crops as reference

    return reference.multi_view_crops(pictures, views, size, mean, std, dtype)


def views_are_compiled(backend: str | None = None) -> bool:
    """Whether the compiled operators draw views, and cut those of pictures on the CPU.

    They draw on the CPU, whatever backend is in force for tensors elsewhere.
    backend: as the argument of the ops; None asks about the backend in force.
    """
    if backend is None:
        return library.load() is None and not reference_asked()
    return resolve_device_backend(torch.device("cpu"), backend) == "cpu"


def check(
    pictures: Sequence[Tensor],
    views: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Raises ValueError where pictures, views and what is to be made of them do not go together."""
    for index, picture in enumerate(pictures):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.numel() == 0:
            raise ValueError(
                f"pictures[{index}] must be (height, width, 3) uint8 with pixels, "
                f"got {tuple(picture.shape)} {picture.dtype}"
            )
        if picture.device != pictures[0].device:
            raise ValueError(f"pictures must be on one device, got {pictures[0].device} and {picture.device}")
    if views.dtype != torch.int64 or views.ndim != 2 or views.shape[1] != len(VIEW_COLUMNS):
        raise ValueError(f"views must be (N, {len(VIEW_COLUMNS)}) int64, got {tuple(views.shape)} {views.dtype}")
    if views.device.type != "cpu":
        raise ValueError(f"views must be on the CPU, where they are drawn and checked, got {views.device}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have 3 values, got {len(mean)} and {len(std)}")
    if 0 in torch.tensor(std, dtype=torch.float32):
        raise ValueError(f"std must not be zero, got {tuple(std)}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if not len(views):
        return
    named, top, left, height, width, resized_height, resized_width, window_top, window_left, *_ = views.unbind(1)
    least, most = int(named.min()), int(named.max())
    if least < 0 or most >= len(pictures):
        raise ValueError(f"views must name pictures in 0..{len(pictures) - 1}, got {least}..{most}")
    sides = torch.tensor([picture.shape[:2] for picture in pictures])[named]
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    inside &= (top + height <= sides[:, 0]) & (left + width <= sides[:, 1])
    if not bool(inside.all()):
        bad = int((~inside).nonzero()[0])
        raise ValueError(
            f"views[{bad}] has a box (top, left, height, width) of {tuple(views[bad, 1:5].tolist())} "
            f"in a picture of {tuple(sides[bad].tolist())}"
        )
    inside = (window_top >= 0) & (window_left >= 0)
    inside &= (window_top + size <= resized_height) & (window_left + size <= resized_width)
    if not bool(inside.all()):
        bad = int((~inside).nonzero()[0])
        raise ValueError(
            f"views[{bad}] has a window of {size} at {tuple(views[bad, 7:9].tolist())} "
            f"in a resized box of {tuple(views[bad, 5:7].tolist())}"
        )
