"""Other runs of the same user on this machine, which share its cores or a GPU with this one.

Each run has a file in a folder of the cache and holds a lock on it until its end. The system releases the lock when the
process ends, whatever the reason, so that no file of a dead process counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rada_fast import _env
from rada_fast.errors import UserError

GUARD = "guard.lock"
"""The file whose lock a run holds while it looks for others, so that of two that start together one sees the other."""


@dataclass(frozen=True)
class Neighbour:
    """A run that uses a device of this machine.

    process: the number of its process.
    device: the device, "cpu" or "cuda:0".
    output: the folder of its results.
    cores: the cores that it may use, by number.
    """

    process: int
    device: str
    output: str
    cores: tuple[int, ...] = ()


_descriptors: dict[str, int] = {}
"""The files of this process, open and locked, by device."""


def _close() -> None:
    for descriptor in _descriptors.values():
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


# A forked process would hold the locks after its parent's end.
os.register_at_fork(after_in_child=_close)


def announce(device: str, output: str, *, exclusive: bool = False) -> list[Neighbour]:
    """Let other runs know of this one until it leaves or its process ends. Returns those that share its device now.

    device: the device of this run; output: the folder of its results.
    exclusive: whether this run refuses to share the device.

    Runs on a CPU share it if there is a core that both may use. Where the cache cannot be written to or has no locks,
    nobody knows of anybody.

    Raises UserError if another run shares the device, and exclusive is set.
    """
    own = Neighbour(os.getpid(), device, output, tuple(_env.usable_cores()) if device == "cpu" else ())
    try:
        folder = _env.cache_dir() / "running"
        folder.mkdir(parents=True, exist_ok=True)
        with _guarded(folder / GUARD):
            found = [one for one in _others(folder) if _share(one, own)]
            if found and exclusive:
                raise UserError(f"exclusive: {described(found[0])} uses {named(device)} already; wait for its end")
            _register(folder, own)
    except OSError:
        return []
    return found


def leave() -> None:
    """Let the other runs of this machine know that the run of this process has ended, although the process goes on."""
    _close()


def named(device: str) -> str:
    """Return the words for a device in a message."""
    return "the cores" if device == "cpu" else device


def described(one: Neighbour) -> str:
    """Return the words for a run in a message."""
    return f"another run of yours (process {one.process}, {one.output})"


def advice(found: list[Neighbour], device: str) -> str:
    """Return one line about runs that share a device, and how to divide it."""
    first = f"{described(found[0])}{f' and {len(found) - 1} more' if len(found) > 1 else ''}"
    if device != "cpu":
        return f"{first} uses {device} too: both take longer; give --device to use another one"
    cores = _env.usable_cores()
    share = max(1, len(cores) // (len(found) + 1))
    text = f"{first} uses the same {len(cores)} cores: each takes longer"
    if len(cores) < 2:
        return text
    parts = [cores[-share:], cores[: len(cores) - share]]
    return (
        f"{text}; to divide the cores, start one run with 'taskset -c {_ranges(parts[0])}' and the other with "
        f"'taskset -c {_ranges(parts[1])}'"
    )


def _ranges(cores: list[int]) -> str:
    """Return numbers as taskset reads them, such as 0-3,8."""
    groups: list[list[int]] = []
    for core in sorted(cores):
        if groups and core == groups[-1][1] + 1:
            groups[-1][1] = core
        else:
            groups.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in groups)


def _share(one: Neighbour, own: Neighbour) -> bool:
    if one.device != own.device or one.process == own.process:
        return False
    return own.device != "cpu" or bool(set(one.cores) & set(own.cores))


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _others(folder: Path) -> Iterator[Neighbour]:
    """Yield the other runs of this machine, and remove the files of those that have ended."""
    for path in sorted(folder.glob(f"{_prefix()}*.json")):
        if path.name.startswith(f"{_prefix()}{os.getpid()}-"):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)  # nobody holds it: its process has ended
        except BlockingIOError:
            with suppress(ValueError, TypeError, KeyError):
                content: dict[str, Any] = json.loads(os.pread(descriptor, 2**16, 0))
                yield Neighbour(**(content | {"cores": tuple(content["cores"])}))
        finally:
            os.close(descriptor)


def _register(folder: Path, own: Neighbour) -> None:
    path = folder / f"{_prefix()}{own.process}-{own.device.replace(':', '')}.json"
    if own.device not in _descriptors:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(descriptor)
            raise
        _descriptors[own.device] = descriptor
    descriptor = _descriptors[own.device]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(own)).encode("ascii"), 0)


def _prefix() -> str:
    """Return how the names of this machine's files begin. Several machines may have one cache."""
    node = platform.node()
    return "".join(letter if letter.isalnum() else "_" for letter in node) + "-"
