"""States of a training: the newest one and the one before it, each checked before it is used."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rada_fast.system import files, memory, notices, termination

_NOT_DAMAGED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
)
"""Errors of reading that say nothing about a file, which may be intact."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file NAME.pt, and keep the one before it as NAME-previous.pt."""
    files.write_state(path, state, previous=previous_of(path))


def load(path: Path, use: Callable[[dict[str, Any]], None]) -> bool:
    """Read the newest usable state, without executing code, and call use() with it.

    use: a function that raises an exception if the state does not fit, before it changes anything. A file that is
    damaged or does not fit gets another name, with a warning, and the state before it is tried.

    Returns whether there was a usable state. Raises the error if memory runs out or the file cannot be read at present,
    which says nothing about the state.
    """
    for one in (path, previous_of(path)):
        if not one.is_file():
            continue
        try:
            with zipfile.ZipFile(one) as archive:
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {part} is another one")
            state = torch.load(one, map_location="cpu", weights_only=True)
            use(state)
        except Exception as error:  # a damaged archive fails in any of zipfile's, zlib's and torch's ways
            termination.raise_if_asked()  # which torch.load may have taken for such damage
            if memory.is_lack_of_memory(error) or (isinstance(error, OSError) and error.errno in _NOT_DAMAGED):
                raise
            aside = files.set_aside(one)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
            if "Weights only load failed" in reason:
                reason = "it holds more than tensors and plain values"
            notices.warn(
                f"state {one} is damaged ({reason}) and was set aside as {aside.name}; the run goes on from the "
                "one before it, or from the start where there is none"
            )
        else:
            return True
    return False


def previous_of(path: Path) -> Path:
    """Return the path of the state before the newest one."""
    return path.with_name(f"{path.name.removesuffix('.pt')}-previous.pt")
