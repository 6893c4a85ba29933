"""Check the arguments of the ops over pictures, and decide whether the compiled operators serve a call."""

from __future__ import annotations

from collections.abc import Sequence

import PIL
import torch
from torch import Tensor

from rada_fast.ops._backends import library
from rada_fast.ops._backends.choice import reference_asked, resolve_device_backend
from rada_fast.ops._backends.compiled import VIEW_COLUMNS as VIEW_COLUMNS

CROP_SCALE = (0.08, 1.0)
"""The least and largest share of the picture in a random crop: torchvision's default, which test-time protocols use."""
CROP_RATIO = (3 / 4, 4 / 3)
"""The least and largest width over height of a random crop: torchvision's default."""

TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""From version 13 on, Pillow resizes vertically first where the height loses over twice as many pixels as the width.
Both passes round to whole values, so their order matters; the compiled operators follow the installed Pillow."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def views_are_compiled(backend: str | None = None) -> bool:
    """Return whether the compiled operators draw views, and cut those of pictures on the CPU.

    Views are drawn on the CPU, whatever backend is in force for tensors elsewhere.
    backend: the ops' argument of this name; None means the backend in force.
    """
    if backend is None:
        return library.load() is None and not reference_asked()
    return resolve_device_backend(torch.device("cpu"), backend) == "cpu"


def check_sides(height: int, width: int, size: int) -> None:
    """Raise ValueError where a picture or a view of it would have no pixels."""
    if min(height, width, size) < 1:
        raise ValueError(f"height, width and size must be at least 1, got {height}, {width} and {size}")


def check_draw(height: int, width: int, size: int, count: int) -> None:
    """Raise ValueError where a picture or a view of it would have no pixels, or the number of views is negative."""
    check_sides(height, width, size)
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")


def cuts_compiled(pictures: Sequence[Tensor], backend: str | None) -> bool:
    """Return whether the compiled operators cut the views of these pictures; otherwise the reference does.

    The pictures are on one device.
    Raises BackendUnavailableError where a named backend cannot serve.
    """
    device = pictures[0].device if len(pictures) else torch.device("cpu")
    return resolve_device_backend(device, backend) != "reference"


def check_views(
    pictures: Sequence[Tensor],
    views: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Raise ValueError where a view leaves its picture, or an argument has a wrong shape, type or device."""
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
    if not pictures:
        raise ValueError(f"pictures must hold those that the {len(views)} views name, got none")
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
