"""Load the compiled operators, and register their result shapes and gradients with PyTorch."""

from __future__ import annotations

from typing import Any

from rada_fast.extension import libraries
from rada_fast.ops._backends import compiled

_registered: list[str | None] = []


def load() -> str | None:
    """Load the operators for CPU tensors, once. Returns None where they are usable, else the reason; never raises."""
    if reason := libraries.load():
        return reason
    if not _registered:
        _registered.append(_register())
    return _registered[0]


def load_cuda() -> str | None:
    """Load the operators for CUDA tensors, once. Returns None where they are usable, else the reason; never raises.

    The operators are loaded also where no CUDA device is visible.
    """
    reason = load()
    return libraries.load_cuda() if reason is None else f"the CUDA kernels need the rest of the extension: {reason}"


def _register() -> str | None:
    try:
        compiled.register()
    except Exception as error:  # A library with other schemas must break nothing else.
        return f"the extension does not load: {str(error).splitlines()[0]}"
    return None


# torch.compile takes the results as constants instead of tracing the search for files, see extension/libraries.py.
_functions: list[Any] = [load, load_cuda]
for _function in _functions:
    _function._dynamo_marked_constant = True
