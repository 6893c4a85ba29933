"""Every write of results goes through here: files that appear whole or not at all, lines that are whole, one error.

Whatever a library raises where a disk is full or a folder has gone becomes an OSError that names the file. Files get
the permissions that the user's umask leaves.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.partial")
"""Names of files that are being written, or that a killed process left behind."""


def write_text(path: Path, text: str) -> None:
    """Write a text file; it must be ASCII, so that file names in any encoding make readable files."""
    _write_whole(path, lambda temporary: temporary.write_text(text, encoding="ascii"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors. metadata: for the file's header."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def write_state(path: Path, state: Mapping[str, Any], *, previous: Path) -> None:
    """Write tensors and plain values as a torch file, with a checksum of every part; the file before it is kept.

    previous: where that one goes.
    """
    import torch

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            recorder = _ErrorRecorder(file)
            try:
                torch.save(dict(state), cast(BinaryIO, recorder))
            except RuntimeError:
                # torch's own message tells neither the file nor the reason.
                if recorder.error is not None:
                    raise recorder.error from None
                raise

    def keep() -> None:
        if path.exists():
            rename(path, previous)

    _write_whole(path, write, before_replacing=keep)


def append_line(path: Path, line: str) -> None:
    """Add an ASCII line; it is with the operating system before this returns, or the file is as it was."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            content = f"{line}\n".encode("ascii")
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            with suppress(OSError):
                file.truncate(before)
            raise _named(error, path) from error


def remove(path: Path) -> None:
    """Remove one file, where it exists."""
    path.unlink(missing_ok=True)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in its folder, in place of what had that name."""
    path.replace(new)


def _write_whole(
    path: Path, write: Callable[[Path], object], before_replacing: Callable[[], None] | None = None
) -> None:
    """Let write() write a temporary file beside path, and put it in path's place when it is with the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with _one_error(path):
        try:
            # Made here for the permissions that the umask leaves; safetensors and tempfile choose their own.
            temporary.open("wb").close()
            permissions = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(permissions)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if before_replacing is not None:
                before_replacing()
            rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """OSError, naming the file, for whatever a failing disk makes of a write."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _named(error, path) from error
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        code = int(found.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def _named(error: OSError, path: Path) -> OSError:
    """The same error of the file that was to be written, not of its temporary stand-in."""
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


class _ErrorRecorder:
    """A file that remembers the error of a failed write, which torch.save would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
