"""Image files: which files are pictures, and their decoding to 8-bit RGB."""

from __future__ import annotations

import errno
import os
import re
import stat
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""What Pillow knows but does not decode itself: it would start Ghostscript for EPS, and has stubs for the others."""
PICTURES_WITHOUT_A_DECODER = frozenset({".heic", ".heif", ".jxl"})
"""Pictures all the same where no plugin of Pillow reads them: they are counted as unreadable, not passed over."""
NO_HANDLES_LEFT = frozenset({errno.EMFILE, errno.ENFILE})

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
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message names the file and the reason."""


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow and its plugins decode."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@cache
def picture_extensions() -> frozenset[str]:
    """How pictures' names end, in small letters."""
    decoded = {*_formats(), "MPO"}  # a JPEG of several pictures
    known = {ending for ending, name in Image.registered_extensions().items() if name in decoded}
    return frozenset(known) | PICTURES_WITHOUT_A_DECODER


def is_picture(path: Path) -> bool:
    """Whether a regular file is a picture, readable or not: by its name's ending, otherwise by its first bytes."""
    if path.suffix.lower() in picture_extensions():
        return True
    try:
        with _open_regular(path) as file:
            return _MAGIC.match(file.read(512)) is not None
    except OSError as error:
        if error.errno in NO_HANDLES_LEFT:
            raise
        return False


def kind_of_entry(mode: int) -> str:
    """What something that is no regular file is, in words. mode: st_mode of its stat."""
    return next((kind for test, kind in _KINDS if test(mode)), "no regular file")


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file, and nothing that could wait for a writer or act on being opened.

    Raises OSError where it is something else or cannot be opened.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of_entry(mode)}, not a file")
    # Another program may have put something else in its place by now.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of_entry(mode)}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_image(path: Path) -> Image.Image:
    """A decoded RGB image.

    Grey, palette, transparent and CMYK pictures are converted as torchvision's loader does: transparency is dropped,
    the first picture of an animation is taken, and a camera's orientation tag turns nothing. Pixels of 16 bits are
    scaled to 8; so are floating-point ones, which must lie in 0 ... 1 or, where one is above 1, in 0 ... 255.

    Raises UnreadableImageError where the file is missing, damaged, of no known kind, or too large to be a picture.
    """
    try:
        # A picture past PIL's pixel limit warns before it raises at twice the limit: both are refused here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open_regular(path) as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise UnreadableImageError("the file is empty")
                with Image.open(file, formats=_formats()) as image:
                    return _to_rgb(image)
    except UnidentifiedImageError:
        reason = "not an image of a known kind"
    except OSError as error:
        if error.errno in NO_HANDLES_LEFT:
            # It says nothing about the file: with the run stopped, the same command goes on later.
            raise
        # Pillow's own OSErrors have no number, and others' texts would repeat the path.
        reason = (error.strerror if error.errno else None) or str(error) or type(error).__name__
    except Exception as error:  # damaged files reach decoders' code paths that raise anything
        reason = str(error) or type(error).__name__
    raise UnreadableImageError(f"{path.name} cannot be read: {reason.splitlines()[0]}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any picture; Pillow alone clips what has more than 8 bits, to white or black."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey(_turned(_from_whole_numbers(np.asarray(image), image), image))
    if image.mode == "F":
        return _grey(_turned(_from_floats(np.asarray(image)), image))
    if image.mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def _turned(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """8-bit values of a TIFF whose 0 is white, turned: Pillow does that for pixels of 8 bits and fewer only."""
    zero_is_white = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    return 255 - values if zero_is_white else values


def _from_whole_numbers(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """16-bit grey values to 8 bits, rounded. Pillow hands some of them on as 32-bit ones."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImageError(
            f"pixels of 32-bit whole numbers must lie in 0 ... 65535 to be brightnesses, got {low} ... {high}"
        )
    if image.mode == "I" and image.format not in ("PNG", "PPM") and high <= 255:
        # 8-bit values in a wide type. PNG's and PPM's own brightnesses always reach to 65535.
        return values.astype(np.uint8)
    # Signed values of 16 bits end at half of it.
    signed = isinstance(image, TiffImageFile) and image.tag_v2.get(BITSPERSAMPLE) == (16,) and image.mode == "I"
    white = 32767 if signed else 65535
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _from_floats(values: np.ndarray) -> np.ndarray:
    """Floating-point grey values, in 0 ... 1 or 0 ... 255, to 8 bits, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # NaN included
        raise UnreadableImageError(
            f"floating-point pixels must lie in 0 ... 1 or 0 ... 255 to be brightnesses, got {low:g} ... {high:g}"
        )
    return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
