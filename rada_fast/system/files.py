"""The writing of results: a file appears as a whole or not at all, and so does a line.

A whole file is written under a temporary name, brought to the disk, read back and compared, and then renamed; the
folder with its new name is brought to the disk, too. Until then the file that was there stays as it was.

Whatever a library raises when a disk is full or a folder has disappeared becomes an OSError that names the file. Files
get the permissions that the user's umask allows.
"""

from __future__ import annotations

import errno
import hashlib
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

PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.partial(\.gz)?")
"""The names of files that are being written or that a killed process has left behind. PyTorch's profiler adds .gz."""


def write_text(path: Path, text: str, *, encoding: str = "ascii") -> None:
    """Write a text file. The files of runs are ASCII, so that they are readable whatever file names are encoded in."""
    content = text.encode(encoding)
    _write_whole(
        path,
        lambda temporary: temporary.write_bytes(content),
        is_intact=lambda temporary: temporary.read_bytes() == content,
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_by(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by a function that writes to the path it is given, which is that of a temporary file beside it."""
    _write_whole(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors in the format of safetensors. metadata: texts for the header of the file."""
    from safetensors.torch import load_file, save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def is_intact(temporary: Path) -> bool:
        stored = load_file(temporary)
        return stored.keys() == plain.keys() and all(_same_bits(stored[name], plain[name]) for name in plain)

    _write_whole(path, lambda temporary: save_file(plain, temporary, metadata=metadata), is_intact=is_intact)


def write_state(path: Path, state: Mapping[str, Any], *, previous: Path) -> None:
    """Write tensors and plain values as a torch file, with a checksum of every part, and keep the file that was there.

    previous: the path to which that file is moved.
    """
    import torch

    written = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            recorder = _ErrorRecorder(file, written)
            try:
                torch.save(dict(state), cast(BinaryIO, recorder))
            except RuntimeError:
                # PyTorch's own message names neither the file nor the reason.
                if recorder.error is not None:
                    raise recorder.error from None
                raise

    def is_intact(temporary: Path) -> bool:
        with temporary.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == written.digest()

    def keep() -> None:
        if path.exists():
            rename(path, previous)

    _write_whole(path, write, is_intact=is_intact, before_replacing=keep)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    import torch

    same_form = first.shape == second.shape and first.dtype == second.dtype
    return same_form and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))


def append_line(path: Path, line: str) -> None:
    """Add an ASCII line to a file. If the operating system does not take the whole line, the file stays as it was."""
    append_bytes(path, f"{line}\n".encode("ascii"))


def append_bytes(path: Path, content: bytes) -> None:
    """Add bytes to a file. If the operating system does not take all of them, the file stays as it was."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
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
    path: Path,
    write: Callable[[Path], object],
    *,
    is_intact: Callable[[Path], bool] = lambda temporary: True,
    before_replacing: Callable[[], None] = lambda: None,
) -> None:
    """Let write() write a temporary file beside path, and move it to path when the disk has it.

    is_intact: a function that reads the file back and returns whether it is what was written.
    before_replacing: a function that is called when the file is known to be on the disk.
    """
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
                if hasattr(os, "posix_fadvise"):
                    # What is read back then comes from the disk, and not from memory, where the system allows it.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not is_intact(temporary):
                raise OSError(errno.EIO, "what was read back is not what was written")
            before_replacing()
            rename(temporary, path)
            _bring_names_to_disk(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _bring_names_to_disk(folder: Path) -> None:
    """Bring the names of the files in a folder to the disk, where the file system can do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # the folder may be written to, and not be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


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
    """A file that keeps the error of a failed write, which torch.save would hide.

    digest: the hash of everything that is written.
    """

    def __init__(self, file: BinaryIO, digest: hashlib._Hash) -> None:
        self.file, self.digest = file, digest
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self.file.write(data)
            self.digest.update(data)
            return count
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
