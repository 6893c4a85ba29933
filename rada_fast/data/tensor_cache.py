"""Tensors kept on disk that can be made again: a damaged or unwritable cache costs time, never a run."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rada_fast.system import files


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None where it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a cache file, whole or not at all; warns where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(path, tensors)
    except OSError as error:
        warnings.warn(f"cache {path.parent} cannot be written, going on without it: {error}", stacklevel=2)
