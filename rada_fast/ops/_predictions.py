"""Check the logits of the ops over predictions, and decide whether the compiled operator serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops._backends.choice import chosen_backend, resolve_device_backend
from rada_fast.ops._backends.transforms import TRANSFORM_REASON, under_transform

SERVED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_compiled(logits: Tensor) -> bool:
    """Return whether the compiled operator serves a call; otherwise the reference does.

    Raises BackendUnavailableError where a named backend cannot serve.
    """
    if under_transform():
        if (name := chosen_backend()) == logits.device.type:
            raise BackendUnavailableError(f"backend {name!r} cannot serve this call: {TRANSFORM_REASON}")
        return False
    return resolve_device_backend(logits.device) != "reference"


def check_logits(logits: Tensor, shape: str) -> None:
    """Raise TypeError or ValueError unless the logits have a type and a shape that the ops accept."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in SERVED:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0 or logits.shape[-2] == 0:
        raise ValueError(f"logits must be {shape}, got {tuple(logits.shape)}")
