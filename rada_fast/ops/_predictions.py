"""What the ops over predictions share: which implementation serves a call on its tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_fast import extension
from rada_fast.errors import BackendUnavailableError
from rada_fast.ops._backend import chosen_backend

SERVED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def reason_not_served(logits: Tensor) -> str | None:
    """Why the compiled operators cannot serve logits, or None where they can. Dispatch, errors and tests use it."""
    match logits.device.type:
        case "cpu":
            return extension.load()
        case "cuda":
            return extension.load_cuda()
        case device:
            return f"it serves CPU and CUDA tensors, logits are on {device}"


def is_compiled(logits: Tensor) -> bool:
    """Whether the compiled operator serves a call; else the reference does.

    The backends "cpu" and "cuda" ask for it by name. The others are the adapter's: "reference" and "literal" mean plain
    PyTorch here too, "triton" leaves the choice open, as "auto" does.
    """
    name = chosen_backend()
    if name in ("reference", "literal"):
        return False
    reason = reason_not_served(logits)
    if name in ("cpu", "cuda"):
        if reason is None and logits.device.type != name:
            reason = f"it serves {name.upper()} tensors, logits are on {logits.device}"
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot serve this call: {reason}")
    return reason is None


def check_logits(logits: Tensor, shape: str) -> None:
    """Raise TypeError or ValueError where logits are not what the ops take."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in SERVED:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0 or logits.shape[-2] == 0:
        raise ValueError(f"logits must be {shape}, got {tuple(logits.shape)}")
