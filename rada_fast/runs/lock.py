"""A lock on a folder that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import stat
import weakref
from contextlib import suppress
from pathlib import Path

from rada_fast.errors import UserError
from rada_fast.system import notices

_OWNER = re.compile(rb"(process \d+ on [^\n]*\n)?")
"""What a lock's file holds: nothing yet, or whose it is."""
_held: set[int] = set()
"""Open descriptors of the locks that this process holds."""


def _close_in_child() -> None:
    # A forked process shares the lock, and would hold it after its parent was killed.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _release(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


class FolderLock:
    """Holds a lock (flock) on a file until it is released.

    path: the lock's file, which is made and stays. Where the file system has no locks, this warns and goes on.

    Raises UserError where another process, or another run in this one, holds the lock, or the file is somebody else's;
    OSError where it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        foreign = UserError(
            f"output {path.parent} holds a {path.name} that no run of this program made; nothing is written into it: "
            "give another --output"
        )
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise foreign from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _OWNER.fullmatch(os.pread(descriptor, 1000, 0)):
            os.close(descriptor)
            raise foreign
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                owner = os.pread(descriptor, 200, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"output {path.parent} is in use by another run ({owner or 'just started'}); wait for its end, or "
                    "give another --output"
                ) from None
            notices.warn(
                f"output {path.parent} lies on a file system without locks ({error.strerror}); take care that no other "
                "process runs in it at the same time"
            )
        _held.add(descriptor)
        self._finalizer = weakref.finalize(self, _release, descriptor)
        with suppress(OSError):  # whose lock it is only helps whoever is refused
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"), 0)

    def release(self) -> None:
        """Let others have it."""
        self._finalizer()
