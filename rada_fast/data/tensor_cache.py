"""Tensors kept on disk that can be made again: a damaged or unwritable cache costs time, never a run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None where it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a cache file, whole or not at all; warns where the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        warnings.warn(f"cache {path.parent} cannot be written, going on without it: {error}", stacklevel=2)
