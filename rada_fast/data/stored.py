"""Places of pictures: regular files, members of tar archives, and files with a frame to cut off."""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from rada_fast.data.fingerprints import file_stamp

MOST_BYTES = 2**31
"""A member of an archive that is larger than this is no picture."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of_entry(mode: int) -> str:
    """Return what an entry that is not a regular file is, in words. mode: the st_mode of its stat."""
    return next((kind for test, kind in _KINDS if test(mode)), "no regular file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file. A FIFO or a device is refused, because opening it could wait for ever or have an effect.

    Raises OSError where the path is not a regular file or cannot be opened.
    """
    if not stat.S_ISREG(mode := path.stat().st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of_entry(mode)}, not a file")
    # Another program may have replaced the file since the check.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of_entry(mode)}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


@runtime_checkable
class StoredPicture(Protocol):
    """A picture that is more than the path of a file. It can be sent to another process."""

    @property
    def name(self) -> str:
        """The name of the picture, for messages."""

    @property
    def frame(self) -> int:
        """The number of pixels to cut off at each edge."""

    def open(self) -> BinaryIO:
        """Open the encoded picture. Raises OSError where that is not possible."""

    def stamp(self) -> str:
        """Return a text that changes when the picture may have changed."""


Location = Path | StoredPicture
"""The place of a picture."""


@dataclass(frozen=True)
class TarMember:
    """A picture in a tar archive that is not compressed.

    archive: the path of the archive; member: its name in the archive; offset, size: the place of its bytes.
    """

    archive: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The names of the archive and of the member."""
        return f"{self.archive.name}/{self.member}"

    @property
    def frame(self) -> int:
        """No pixels are cut off."""
        return 0

    def open(self) -> BinaryIO:
        """Read the bytes of the member. Raises OSError where the archive is shorter than it was."""
        if self.size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"it has {self.size} bytes, which no picture has")
        with open_regular(self.archive) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(errno.EIO, "its archive has become shorter")
        return io.BytesIO(data)

    def stamp(self) -> str:
        """Return the stamp of the archive and the place of the member."""
        return f"{file_stamp(self.archive)} {self.offset} {self.size}"


@dataclass(frozen=True)
class FramedFile:
    """A picture file with a frame that does not belong to the picture.

    path: the file; frame: the width of the frame in pixels.
    """

    path: Path
    frame: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    def open(self) -> BinaryIO:
        """Open the file. Raises OSError where it is not a regular one."""
        return open_regular(self.path)

    def stamp(self) -> str:
        """Return the stamp of the file and the width of the frame."""
        return f"{file_stamp(self.path)} frame {self.frame}"


@dataclass(frozen=True)
class AbsentFile:
    """A picture that a list names and that did not exist when the list was read.

    It counts as unreadable by itself, whatever becomes of its folder. path: the file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    @property
    def frame(self) -> int:
        """No pixels are cut off."""
        return 0

    def open(self) -> BinaryIO:
        """Open the file, which may exist by now. Raises OSError, which does not name the file, where it does not."""
        try:
            return open_regular(self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror) from None

    def stamp(self) -> str:
        """Return the stamp of the file."""
        return file_stamp(self.path)


def location_stamp(place: Location) -> str:
    """Return a text that changes when the picture at a place may have changed."""
    return file_stamp(place) if isinstance(place, Path) else place.stamp()
