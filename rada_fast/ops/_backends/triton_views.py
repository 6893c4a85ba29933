"""Keep the most confident views by the Triton launches in kernels/, and say which calls they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_fast.kernels._common import MAX_EPISODES
from rada_fast.kernels.view_selection import KeptViews, kept_views
from rada_fast.ops._backends.triton import executes_on_cpu, float32_precision
from rada_fast.reference.rational_projections import as_scale

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def reason_not_served(views: Tensor) -> str | None:
    """Return why the Triton launches cannot serve a call, or None where they can."""
    device = views.device.type
    if device != "cuda" and not (device == "cpu" and executes_on_cpu()):
        return f"it serves CUDA tensors, view_features are on {views.device}"
    if views.dtype not in _SERVED:
        return f"it serves float32, bfloat16 and float16, not {str(views.dtype).removeprefix('torch.')}"
    if views.shape[2] % 32:
        return f"it serves widths that are multiples of 32, not {views.shape[2]}"
    if views.shape[0] > MAX_EPISODES:
        return f"it serves at most {MAX_EPISODES} episodes, not {views.shape[0]}"
    return None


def keep_views(views: Tensor, text_features: Tensor, logit_scale: Tensor | float, count: int) -> KeptViews:
    """Compute ops.keep_views, with its arguments and results, for a call that reason_not_served lets pass."""
    scale = as_scale(logit_scale, views, torch.float32)
    with torch.cuda.device_of(views):
        return kept_views(
            views.contiguous(), text_features.contiguous(), scale, count, precision=float32_precision()
        )  # fmt: skip
