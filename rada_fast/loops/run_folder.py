"""The folder of one run: what it is, a JSON line for everything finished, a summary; safe to interrupt and go on."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import rada_fast
from rada_fast.config import RunOptions
from rada_fast.errors import UserError

IDENTITY_FILE = "run.json"


class RunFolder:
    """Results of one run.

    options: output folder and whether another run's results there may be removed.
    identity: everything that changes a result; a folder of a run with another identity is refused.

    Raises UserError where the folder holds another run's results.
    """

    def __init__(self, options: RunOptions, identity: dict[str, Any]) -> None:
        self.path = Path(options.output).expanduser()
        identity = json.loads(json.dumps(identity))
        stored = self._stored_identity()
        if stored is not None and stored != identity:
            if not options.overwrite:
                changed = sorted(_differences(stored, identity))
                raise UserError(
                    f"output {self.path} holds another run's results (differing: {', '.join(changed[:6])}); "
                    "give another --output, or --overwrite to remove them"
                )
            stored = None
        if stored is None and options.overwrite and self.path.is_dir() and (self.path / IDENTITY_FILE).is_file():
            # Only a folder that a run of ours made is ever removed.
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {self.path} cannot be made: {error.strerror}") from None
        self.resumed = stored is not None
        if stored is None:
            write_json(self.path / IDENTITY_FILE, identity)

    def _stored_identity(self) -> Any:
        try:
            return json.loads((self.path / IDENTITY_FILE).read_text())
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError):
            return {"damaged": True}

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records finished so far. A last line torn by a crash is removed from the file."""
        path = self.path / name
        if not path.is_file():
            return []
        records, good = [], 0
        content = path.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                break
            if not line.endswith(b"\n"):
                break
            records.append(record)
            good += len(line)
        if good < len(content):
            os.truncate(path, good)
        return records

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line; it is with the operating system before this returns.

        It is ASCII, so that file names in any encoding make readable lines.
        """
        with (self.path / name).open("a", encoding="ascii") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a whole file of lines, or leave it as it is where it holds just these; ASCII, as append writes."""
        content = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        path = self.path / name
        if not path.is_file() or path.read_bytes() != content.encode("ascii"):
            _write_text(path, content)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors as safetensors; the file appears whole or not at all."""
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        os.close(handle)
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
            Path(temporary).replace(self.path / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, *names: str) -> None:
        """Remove files of this run, where they exist."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        """Write tensors and plain values; the file appears whole or not at all."""
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load_state(self, name: str) -> dict[str, Any] | None:
        """The state saved under a name, without executing code; None where there is none."""
        path = self.path / name
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        write_json(self.path / "summary.json", summary)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by way of a temporary file in the same folder."""
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _differences(old: Any, new: Any, name: str = "") -> set[str]:
    """Dotted names of the entries in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = set(old) | set(new)
        return {
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        }
    return set() if old == new else {name}


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    found = {"rada_fast": rada_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "open_clip_torch", "triton", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reset_peak_memory() -> None:
    """Start counting the GPU's peak memory anew; the process's own peak only ever grows."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory so far, in MiB: of the process, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if torch.cuda.is_available():
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak
