"""Telling which files are pictures, and decoding pictures to 8-bit RGB."""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor

from rada_fast.data.stored import Location, StoredPicture, open_regular
from rada_fast.system import memory, patience

Picture = str | os.PathLike[str] | StoredPicture | Image.Image | Tensor
"""The forms in which a picture may be given; see pixels_of_picture."""
Anything = TypeVar("Anything")
Result = TypeVar("Result")
MOST_CACHED_BYTES = 2**26
"""A file is read ahead of its decoding up to here. Few pictures are larger."""
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow knows but does not decode itself: it starts Ghostscript for EPS and has stubs for the others."""
PICTURES_WITHOUT_A_DECODER = frozenset({".heic", ".heif", ".jxl"})
"""Endings of picture files that Pillow decodes only with a plugin. Without it they count as unreadable pictures."""
MOST_MEMORY = 2**30
"""More bytes than the decoding of any picture needs: those with more than 90 million pixels are refused."""
NO_HANDLES_LEFT = frozenset({errno.EMFILE, errno.ENFILE})
"""Errors that say that too many files are open, which is no fault of the file that should be opened."""
GONE = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV,
        errno.ENXIO, errno.EIO, errno.ETIMEDOUT,
    }
)  # fmt: skip
"""Errors of a file that is missing, or whose folder or file system is."""

_MAGIC = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n\x1a\n"
    rb"|GIF8[79]a"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00{3}"  # BMP: the size of its second header
    rb"|II[*+]\x00|MM\x00[*+]"  # TIFF
    rb"|RIFF.{4}WEBP"
    rb"|.{4}ftyp(?:avi[fs]|hei[cx]|hev[cx]|mif1|msf1)"  # AVIF, HEIF
    rb"|\x00{3}\x0c(?:jP  |JXL )\r\n\x87\n|\xff\x4f\xff\x51"  # JPEG 2000, JPEG XL
    rb"|P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+\s"  # PBM, PGM, PPM
    rb"|8BPS\x00\x01|qoif",
    re.DOTALL,
)


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message names the file and the reason."""


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow and its plugins decode."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@cache
def picture_extensions() -> frozenset[str]:
    """Return the endings of picture files' names, in small letters."""
    decoded = {*_formats(), "MPO"}  # a JPEG of several pictures
    known = {ending for ending, name in Image.registered_extensions().items() if name in decoded}
    return frozenset(known) | PICTURES_WITHOUT_A_DECODER


def is_picture(path: Path) -> bool:
    """Return whether a regular file is a picture, readable or not, judged by its name's ending or its first bytes."""
    if path.suffix.lower() in picture_extensions():
        return True
    try:
        with open_regular(path) as file:
            return _MAGIC.match(file.read(512)) is not None
    except OSError as error:
        if error.errno in NO_HANDLES_LEFT:
            raise
        return False


def load_into_cache(path: Path) -> None:
    """Let the system read a file into its memory, so that decoding it waits for no disk. Errors are left to that.

    Raises UnreadableImageError if the system takes longer than patience.limit().
    """
    _in_time(_load_into_cache, path, path.name)


def _load_into_cache(path: Path) -> None:
    with suppress(OSError), open_regular(path) as file:
        left = MOST_CACHED_BYTES
        while left > 0 and (part := file.read(2**20)):
            left -= len(part)


def _in_time(work: Callable[[Anything], Result], place: Anything, name: str) -> Result:
    """Call a function that reads a picture, in another thread that is left behind if it hangs."""
    try:
        return patience.call(work, place)
    except patience.OverdueError:
        raise UnreadableImageError(
            f"{name} cannot be read: reading it has not ended within {patience.limit():g} s (--timeout)"
        ) from None


def pixels_of(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, (height, width, 3) uint8."""
    return torch.from_numpy(np.array(image))


def pixels_of_picture(picture: Picture) -> Tensor:
    """Return the pixels of a picture in any form, (height, width, 3) uint8.

    picture: the path of a file; a place in an archive or a table; an image of PIL; or a tensor (3, height, width),
        uint8 or with values in 0..1.

    Raises UnreadableImageError where a file or an image of PIL cannot be decoded, and TypeError or ValueError for
    anything else.
    """
    if isinstance(picture, str | os.PathLike):
        return pixels_of(read_image(Path(picture)))
    if isinstance(picture, StoredPicture):
        return pixels_of(read_image(picture))
    if isinstance(picture, Image.Image):
        with _one_error("the image"):
            return pixels_of(_to_rgb(picture))
    if not isinstance(picture, Tensor):
        raise TypeError(f"a picture must be a path, an image of PIL or a tensor, got {type(picture).__name__}")
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"a picture's tensor must be (3, height, width), got {tuple(picture.shape)}")
    if picture.dtype != torch.uint8:
        if not picture.is_floating_point() or not bool(((picture >= 0) & (picture <= 1)).all()):
            raise ValueError(f"a picture's tensor must be uint8 or have values in 0..1, got {picture.dtype}")
        picture = (picture.detach().float() * 255).round().to(torch.uint8)
    return picture.permute(1, 2, 0).contiguous()


def read_image(place: Location) -> Image.Image:
    """Decode an image file, or an image in an archive or a table, to RGB.

    Grey, palette, transparent and CMYK pictures are converted as torchvision's loader converts them: transparency is
    dropped, an animation gives its first picture, and the orientation tag of a camera is ignored. Pixels of 16 bits are
    scaled to 8. So are floating-point pixels, which must lie in 0 ... 1 or, if one is above 1, in 0 ... 255.

    Raises UnreadableImageError where the file is missing, damaged, of an unknown kind, or too large to be a picture,
    and where the system or the decoder takes longer than patience.limit(). Raises OSError where the folder of the file
    is missing, too, or empty: a disk that was unmounted is no fault of the thousands of pictures that were on it.
    """
    return _in_time(_read_image, place, place.name)


def _read_image(place: Location) -> Image.Image:
    with _one_error(place.name), open_regular(place) if isinstance(place, Path) else place.open() as file:
        if not file.seek(0, os.SEEK_END):
            raise UnreadableImageError("the file is empty")
        file.seek(0)
        with Image.open(file, formats=_formats()) as image:
            # PIL raises at twice its limit of pixels, and only warns of a picture between the two.
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if most is not None and pixels > most:
                raise UnreadableImageError(
                    f"Image size ({pixels} pixels) exceeds limit of {most} pixels, could be decompression bomb DOS "
                    "attack."
                )
            decoded = _to_rgb(image)
    frame = 0 if isinstance(place, Path) else place.frame
    if frame and min(decoded.size) > 2 * frame:
        decoded = decoded.crop((frame, frame, decoded.width - frame, decoded.height - frame))
    return decoded


class _WarningsOff:
    """Ignore the warnings of PIL while any thread decodes a picture.

    warnings.catch_warnings would not do: it puts the filters back that it found, which may be those of another thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = warnings.filters[0]

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                # Whoever has replaced all filters meanwhile has removed this one too.
                with suppress(ValueError):
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


_WARNINGS_OFF = _WarningsOff()


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an UnreadableImageError that names the picture and the reason."""
    try:
        with _WARNINGS_OFF:
            yield
            return
    except UnidentifiedImageError:
        reason = "not an image of a known kind"
    except OSError as error:
        if error.errno in NO_HANDLES_LEFT:
            # This error says nothing about the file. The run stops, and the same command can go on later.
            raise
        if error.errno in GONE and error.filename is not None:
            _check_folder_of(Path(error.filename))
        # Pillow's own OSErrors have no number; the texts of the system's errors would repeat the path.
        reason = (error.strerror if error.errno else None) or str(error) or type(error).__name__
    except MemoryError as error:
        # A damaged file may ask for any amount. No intact one needs more than this.
        if not memory.has_room(MOST_MEMORY):
            raise
        reason = str(error) or "it asks for more memory than a picture needs"
    except Exception as error:  # a decoder may raise anything when a file is damaged
        reason = str(error) or type(error).__name__
    raise UnreadableImageError(f"{name} cannot be read: {reason.splitlines()[0]}") from None


def _check_folder_of(path: Path) -> None:
    """Raise OSError if the folder of a missing file is missing, too, or empty as the place of a disk that has gone."""
    folder = path.resolve().parent
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is not None:
                return
    except OSError:
        pass
    reason = "the folder of pictures was removed, moved or unmounted while they were read"
    raise OSError(errno.ESTALE, reason, str(folder)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any picture to 8-bit RGB. Pixels of more than 8 bits are scaled, where Pillow alone would clip them."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey(_with_black_zero(_from_whole_numbers(np.asarray(image), image), image))
    if image.mode == "F":
        return _grey(_with_black_zero(_from_floats(np.asarray(image)), image))
    if image.mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def _with_black_zero(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Invert the values of a TIFF whose 0 is white. Pillow inverts only pixels of 8 bits and fewer."""
    zero_is_white = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return 255 - values if zero_is_white else values


def _from_whole_numbers(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Scale 16-bit grey values to 8 bits, rounded. Pillow stores some of them in 32 bits."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImageError(
            f"pixels of 32-bit whole numbers must lie in 0 ... 65535 to be brightnesses, got {low} ... {high}"
        )
    if image.mode == "I" and image.format not in ("PNG", "PPM") and high <= 255:
        # These are 8-bit values in a wider type. The brightnesses of PNG and PPM always reach to 65535.
        return values.astype(np.uint8)
    bits = image.tag_v2.get(BITSPERSAMPLE) if isinstance(image, TiffImageFile) else None
    # Signed values of 16 bits end at 32767. TIFF also has pixels of 12 bits, which Pillow stores in 16.
    signed = bits == (16,) and image.mode == "I"
    white = 32767 if signed else 4095 if bits == (12,) else 65535
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _from_floats(values: np.ndarray) -> np.ndarray:
    """Scale floating-point grey values in 0 ... 1 or 0 ... 255 to 8 bits, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # NaN included
        raise UnreadableImageError(
            f"floating-point pixels must lie in 0 ... 1 or 0 ... 255 to be brightnesses, got {low:g} ... {high:g}"
        )
    return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
