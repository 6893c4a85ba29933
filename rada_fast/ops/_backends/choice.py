"""Choose the backend of a call: its argument's, else ``use_backend``'s, else RADA_FAST_BACKEND's, else "auto"."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from rada_fast import _env
from rada_fast.errors import BackendUnavailableError

BACKENDS = ("literal", "reference", "cpu", "triton", "cuda")
PLAIN = ("literal", "reference")
"""The backends in plain PyTorch, which serve every call. Any other backend may refuse a call."""
COMPILED = ("triton", "cpu")
"""The backends that "auto" asks before it takes the reference, the fastest first."""

_chosen: ContextVar[str | None] = ContextVar("rada_fast_backend", default=None)
_traced = threading.local()
"""A copy of ``_chosen`` for torch.compile, which cannot trace a ContextVar's ``get`` before PyTorch 2.13. Its attribute
``name`` is missing where nothing is chosen. Compiled code is guarded by it, so another choice compiles again."""

_blocks: dict[object, str] = {}
_last_entered: str | None = None
"""The backend of the ``use_backend`` block that was entered last, among the open blocks of all threads. A thread that
has entered no block follows it, for instance a thread that data parallelism starts for a replica."""
_lock = threading.Lock()


def _in_force() -> str | None:
    chosen = getattr(_traced, "name", None) if torch.compiler.is_compiling() else _chosen.get()
    return chosen or _last_entered


def _note_block(block: object, name: str | None) -> None:
    """Record that a block was entered with a backend's name, or, with None, that it was left."""
    global _last_entered
    with _lock:
        if name is None:
            del _blocks[block]
        else:
            _blocks[block] = name
        _last_entered = next(reversed(_blocks.values()), None)


def _check_name(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block with one backend.

    name: "auto", or one of BACKENDS. A named backend that cannot serve a call raises BackendUnavailableError there;
    it never falls back. Raises ValueError for an unknown name.

    Every thread has a choice of its own. A thread that has entered no block, such as a replica's or a worker's, follows
    the block that was entered last in the process, as long as that block is open.
    """
    token = _chosen.set(_check_name(name, "backend"))
    _traced.name = name
    _note_block(block := object(), name)
    try:
        yield
    finally:
        _note_block(block, None)
        _chosen.reset(token)
        if (outer := _chosen.get()) is None:
            # The attribute was missing before; without it, code that was compiled outside of the block runs again.
            _traced.__dict__.pop("name", None)
        else:
            _traced.name = outer


def chosen_backend() -> str:
    """Return the backend of a call that names none: ``use_backend``'s, else RADA_FAST_BACKEND's, else "auto"."""
    return _in_force() or _check_name(_env.backend_variable() or "auto", "RADA_FAST_BACKEND")


def _has_triton() -> bool:
    return _env.has_module("triton")


# torch.compile before PyTorch 2.11 cannot trace the search for a module. The answer stays the same in a process.
_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason_unavailable(name: str) -> str | None:
    """Return why a backend cannot be used in this installation, or None where it can."""
    match name:
        case name if name in PLAIN:
            return None
        case "cpu":
            from rada_fast.ops._backends import library

            return library.load()
        case "cuda":
            return "the adapter has Triton kernels on CUDA, no CUDA C++ ones; ask for 'triton'"
        case "triton":
            if not _has_triton():
                return "Triton is not installed"
            from rada_fast.ops._backends import triton

            return triton.reason_unavailable()
        case _:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def backends() -> dict[str, str]:
    """Return every backend by name, with "usable" or the reason why it cannot be used."""
    return {name: reason_unavailable(name) or "usable" for name in BACKENDS}


def reference_asked() -> bool:
    """Return whether ``use_backend`` or RADA_FAST_BACKEND names a backend in plain PyTorch."""
    return (_in_force() or _env.backend_variable()) in PLAIN


def resolve_backend(name: str | None = None, refusal: Callable[[str], str | None] | None = None) -> str:
    """Return the backend that serves a call.

    name: the call's own argument, if it has one. "auto" takes the fastest usable backend that serves the call.
    refusal: takes a backend's name and returns why that backend cannot serve this call, or None where it can. It is not
        asked about backends in plain PyTorch. Without it, only the installation counts.
    Raises BackendUnavailableError where a named backend cannot be used.
    """
    if name is None:
        name = chosen_backend()
    if _check_name(name, "backend") == "auto":
        # A simulator makes Triton usable without a device, but "auto" must not choose it.
        candidates = COMPILED if _env.has_cuda() else ("cpu",)
        for candidate in candidates:
            if reason_unavailable(candidate) is None and (refusal is None or refusal(candidate) is None):
                return candidate
        return "reference"
    if reason := reason_unavailable(name):
        raise BackendUnavailableError(f"backend {name!r} cannot be used: {reason}")
    if name not in PLAIN and refusal is not None and (reason := refusal(name)):
        raise BackendUnavailableError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def resolve_device_backend(device: torch.device, name: str | None = None) -> str:
    """Return the backend of an op that has kernels in C++ and CUDA C++: "cpu", "cuda" or "reference".

    device: the device of the call's tensors, which decides between the kernels.
    name: the call's own argument, if it has one. "auto" takes the compiled operator where it is usable. "literal" means
        the reference here, because the published code's arithmetic concerns the adapter alone. The name of a backend
        of another device, or without kernels for this op, is refused as an argument; in force, it means "auto".
    Raises BackendUnavailableError where a named backend cannot be used or does not serve the device.
    """
    from rada_fast.ops._backends import library

    if name is None:
        name = chosen_backend()
        if name not in PLAIN and name != device.type:
            # The backend in force is meant for the adapter; the other parts of a step choose their own.
            name = "auto"
    if _check_name(name, "backend") in PLAIN:
        return "reference"
    if name not in ("auto", "cpu", "cuda"):
        raise BackendUnavailableError(f"backend {name!r} cannot serve this call: it has no kernel for this op")
    if name != "auto" and device.type != name:
        raise BackendUnavailableError(f"backend {name!r} cannot serve this call: its tensors are on {device}")
    reason: str | None = f"no compiled operator serves tensors on {device}"
    match device.type:
        case "cpu":
            reason = library.load()
        case "cuda":
            reason = library.load_cuda()
    if reason is None:
        return device.type
    if name == "auto":
        return "reference"
    raise BackendUnavailableError(f"backend {name!r} cannot be used: {reason}")
