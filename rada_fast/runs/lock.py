"""A lock on a folder. The system releases it when the process that holds it ends, whatever the reason.

Whoever only wants to know whether a folder is locked asks the system. Trying to take the lock for a moment would refuse
a run that starts at the same moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import stat
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rada_fast.errors import UserError
from rada_fast.system import notices

_OWNER = re.compile(rb"(process \d+ on [^\n]*\n)?")
"""The content of a lock file: nothing yet, or the process that holds the lock."""
_PROCESS = re.compile(r"process (\d+) on ([^\n]*)\n")
_open_descriptors: set[int] = set()
"""The file descriptors of the locks that this process holds."""


def _close_in_child() -> None:
    # A forked process shares the lock, and would still hold it after its parent was killed.
    for descriptor in _open_descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _release(descriptor: int) -> None:
    if descriptor in _open_descriptors:
        _open_descriptors.discard(descriptor)
        os.close(descriptor)


class FolderLock:
    """A lock (flock) on a file, held from the making of this object until release().

    path: the lock file. It is created if necessary and never removed. If the file system has no locks, a warning says
    so and the run goes on without one.

    Raises UserError if another process or another run in this process holds the lock, or if the file is not a lock file
    of this program. Raises OSError if the file cannot be created.
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
        _open_descriptors.add(descriptor)
        self._path, self._descriptor = path, descriptor
        self._finalizer = weakref.finalize(self, _release, descriptor)
        with suppress(OSError):  # the owner is only shown in the message of a run that is refused
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"), 0)

    def check_place(self) -> None:
        """Raise OSError if the lock's file is not in its folder any more: somebody has removed, moved or unmounted it.

        Otherwise files would be made anew in whatever is in its place.
        """
        try:
            there = self._path.stat()
        except FileNotFoundError:
            same = False
        else:
            own = os.fstat(self._descriptor)
            same = (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
        if not same:
            raise OSError(
                errno.ESTALE, "the folder was removed, moved or unmounted while a run used it", str(self._path.parent)
            )

    def release(self) -> None:
        """Release the lock, so that another run can take it."""
        self._finalizer()


@dataclass(frozen=True)
class Owner:
    """The process that holds the lock on a folder, or held it last.

    process, host: its number and the name of its machine.
    since: when it took the lock, in seconds since 1970.
    """

    process: int
    host: str
    since: float


def owner_of(path: Path) -> Owner | None:
    """Return the process that a lock file names, or None if there is no such file or it names none."""
    try:
        if not path.is_file():
            return None
        found = _PROCESS.fullmatch(path.read_bytes()[:200].decode("ascii", "replace"))
        return None if found is None else Owner(int(found[1]), found[2], path.stat().st_mtime)
    except OSError:
        return None


def is_held(path: Path) -> bool | None:
    """Return whether a process of this machine holds a lock file, without touching the lock.

    Returns None where that cannot be known: the process belongs to another machine or to another container, or the
    system is not Linux.
    """
    owner = owner_of(path)
    if owner is None:
        return False
    try:
        state = path.stat()
        listed = Path("/proc/locks").read_text()
    except OSError:
        return None
    place = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    if any("FLOCK" in line and place in line.split() for line in listed.splitlines()):
        return True
    if owner.host != platform.node().encode("ascii", "replace").decode():
        return None
    # Some file systems number their devices in the list in another way than for stat.
    return _has_open(owner.process, path)


def _has_open(process: int, path: Path) -> bool | None:
    """Return whether a process of this machine has a file open, or None where the system does not say."""
    descriptors = Path(f"/proc/{process}/fd")
    try:
        real = str(path.resolve())
        return any(str(entry.readlink()) == real for entry in descriptors.iterdir())
    except PermissionError:
        return None
    except OSError:  # the process has ended
        return False
