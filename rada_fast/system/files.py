"""The writing of results: a file appears as a whole or not at all, and so does a line.

Whatever a library raises when a disk is full or a folder has disappeared becomes an OSError that names the file. Files
get the permissions that the user's umask allows.
"""

from __future__ import annotations

import json
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
"""The names of files that are being written or that a killed process has left behind."""


def write_text(path: Path, text: str, *, encoding: str = "ascii") -> None:
    """Write a text file. The files of runs are ASCII, so that they are readable whatever file names are encoded in."""
    _write_whole(path, lambda temporary: temporary.write_text(text, encoding=encoding))


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_by(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by a function that writes to the path it is given, which is that of a temporary file beside it."""
    _write_whole(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors in the format of safetensors. metadata: texts for the header of the file."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def write_state(path: Path, state: Mapping[str, Any], *, previous: Path) -> None:
    """Write tensors and plain values as a torch file, with a checksum of every part, and keep the file that was there.

    previous: the path to which that file is moved.
    """
    import torch

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            recorder = _ErrorRecorder(file)
            try:
                torch.save(dict(state), cast(BinaryIO, recorder))
            except RuntimeError:
                # PyTorch's own message names neither the file nor the reason.
                if recorder.error is not None:
                    raise recorder.error from None
                raise

    def keep() -> None:
        if path.exists():
            rename(path, previous)

    _write_whole(path, write, before_replacing=keep)


def append_line(path: Path, line: str) -> None:
    """Add an ASCII line to a file. If the operating system does not take the whole line, the file stays as it was."""
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
    """Remove one file if it exists."""
    path.unlink(missing_ok=True)


def rename(path: Path, new: Path) -> None:
    """Give a file another name in its folder; it replaces a file that has this name."""
    path.replace(new)


def set_aside(path: Path) -> Path:
    """Give a damaged file a name that no other file has, and return its new path."""
    new, count = path.with_name(f"{path.name}.damaged"), 1
    while new.exists():
        count += 1
        new = path.with_name(f"{path.name}.damaged-{count}")
    rename(path, new)
    return new


def _write_whole(
    path: Path, write: Callable[[Path], object], before_replacing: Callable[[], None] | None = None
) -> None:
    """Let write() write a temporary file beside path, and move it to path when the disk has it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with _one_error(path):
        try:
            # The file is created here to get the permissions of the umask; safetensors and tempfile choose their own.
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
    """Turn every error of a failed write into an OSError that names the file."""
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
    """Return the same error for the file itself instead of its temporary copy."""
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


class _ErrorRecorder:
    """A file that keeps the error of a failed write, which torch.save would hide."""

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
