"""The only reader of environment variables and device capabilities."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch


def backend_variable() -> str | None:
    """Value of RADA_FAST_BACKEND, or None where it is unset or empty."""
    return os.environ.get("RADA_FAST_BACKEND") or None


def cache_dir() -> Path:
    """Folder for what can be made again: RADA_FAST_CACHE, else the user's cache folder."""
    if value := os.environ.get("RADA_FAST_CACHE"):
        return Path(value).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rada_fast"


def has_module(name: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    return torch.cuda.is_available()


def cpu_capability() -> str:
    """The instruction set PyTorch's own CPU kernels use, for instance AVX512."""
    return torch.backends.cpu.get_cpu_capability()
