"""Compute the attention of an image encoder."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rada_fast.ops._backends import library
from rada_fast.ops._backends.choice import reference_asked
from rada_fast.ops._backends.transforms import under_transform
from rada_fast.reference.encoder_attention import encoder_attention as reference


def encoder_attention(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Compute the attention of each head: softmax(Q K^T / sqrt(d)) V, where d = W / num_heads.

    The compiled operator serves float32 and bfloat16 on a CPU that has fast products of small matrices, where no
    gradient follows; it computes the softmax in float32. PyTorch's own attention serves every other call.

    queries: (N, L', W); keys, values: (N, L, W); one floating-point type, any stride.
    num_heads: the number of heads, a divisor of W.

    Returns (N, L', W). On a CPU, the result for an image does not depend on N to the bit.
    Equivalent to ``scaled_dot_product_attention`` on the heads.
    """
    if _is_served(queries, keys, values, num_heads):
        result: Tensor = torch.ops.rada_fast.encoder_attention(queries, keys, values, num_heads)
        return result
    return reference(queries, keys, values, num_heads)


def _is_served(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> bool:
    needs_gradient = torch.is_grad_enabled() and any(rows.requires_grad for rows in (queries, keys, values))
    return (
        queries.device.type == "cpu"
        and not needs_gradient
        and not under_transform()
        and not reference_asked()
        and queries.shape[-1] // num_heads % 2 == 0
        and _serves(queries.dtype)
    )


@cache
def _serves(dtype: torch.dtype) -> bool:
    """Return whether the compiled operator computes numbers of this type on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or library.load() is not None:
        return False
    rows = torch.ones(1, 2, 2, dtype=dtype)
    try:
        return bool((torch.ops.rada_fast.encoder_attention(rows, rows, rows, 1) == 1).all())
    except (AttributeError, RuntimeError):  # an older build lacks it, or the processor lacks instructions
        return False
