"""Short texts by which a file or a tensor is recognised as the same one in a later run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def file_stamp(path: Path) -> str:
    """Return the size of a file in bytes and the time of its last change in nanoseconds, as one text."""
    try:
        stat = path.stat()
    except OSError:  # A link may lead nowhere; the error of reading it gives the reason.
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}{'' if os.access(path, os.R_OK) else ' locked'}"


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return a short hash of a tensor's type, shape and values."""
    array = np.ascontiguousarray(tensor.detach().cpu().numpy())
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.data)
    return digest.hexdigest()[:16]


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a short hash of the names, types, shapes and bits of tensors, such as the weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
