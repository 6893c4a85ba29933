"""A cache of tensors on disk that can be computed again. A damaged or unwritable cache costs time, but stops no run."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rada_fast.system import files


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a cache file. Returns None where it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a cache file as a whole or not at all. Warns where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(path, tensors)
    except OSError as error:
        warnings.warn(f"cache {path.parent} cannot be written, going on without it: {error}", stacklevel=2)
