"""The attention of an image encoder, by PyTorch's scaled dot-product attention."""

from __future__ import annotations

from torch import Tensor, cat
from torch.nn import functional

LEAST_CPU_QUERIES = 16
"""A CPU's float32 products with fewer rows have results that depend on where the numbers lie in memory, and with it on
the number of images. So a CPU computes the last query several times."""


def encoder_attention(queries: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V for each head. queries: (N, L', W); keys, values: (N, L, W)."""
    rows = queries.shape[1]
    if queries.device.type == "cpu" and 0 < rows < LEAST_CPU_QUERIES:
        queries = cat([queries, queries[:, -1:].expand(-1, LEAST_CPU_QUERIES - rows, -1)], dim=1)
    heads = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (queries, keys, values))  # (N, H, L, d)
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)[:, :rows]  # (N, L', W)
