"""Compute what the forward and the backward pass share: a program's tile, 1 + A for it, and the common arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import COMPUTE_TYPES, attended_rows, product
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.masked_logits.tiles import Tile


@triton.jit
def program_tile(images, classes, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a program's episode, columns, block of columns and tile of rows (see _common).

    Neighbouring programs share their rows.
    """
    blocks: tl.constexpr = D // BLOCK_N
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = program % blocks
    start = (program // blocks) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    rows = images * classes
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return episode, n, block, (start, row, row < rows, rows, classes, episode * images)


@triton.jit
def one_plus_offset(
    attended,
    weight,
    bias,
    tile,
    n,
    share,
    TWO_IMAGES: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return 1 + A for one tile of rows and the columns n."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        o = attended_rows(attended, tile, columns, c, share, D, HEAD, BLOCK_M, BLOCK_C, TWO_IMAGES)
        w = tl.load(weight + n[None, :] * D + columns[:, None])
        accumulator = product(o.to(COMPUTE), w.to(COMPUTE), accumulator, PRECISION)
    if bias is not None:
        accumulator += tl.load(bias + n).to(tl.float32)[None, :]
    return 1.0 + accumulator


def common_tensors(
    image: Tensor, text: Tensor, attended: Attended, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor | None]:
    """Return the tensors that the forward kernel and the kernel of dA both read."""
    return {
        "image": image,
        "text": text,
        "attended_text": attended.text,
        "attended_rational": attended.rational,
        "attended_image": attended.image,
        "factors": attended.factors,
        "weight": weight,
        "bias": bias,
    }


def common_arguments(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    kinds: int,
    episodes: int,
    weight_stride: int,
    dtype: torch.dtype,
    tile: Tile,
) -> dict[str, Any]:
    """Return the other arguments that both kernels have in common. kinds: the number of query kinds in use."""
    return {
        "images": batch // episodes,
        "classes": classes,
        "total_rows": batch * classes,
        "weight_stride": weight_stride,
        "bias_stride": width if weight_stride else 0,
        "share": 1 / kinds,
        "D": width,
        "HEAD": width // num_heads,
        "TWO_IMAGES": classes >= tile.rows,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_C": tile.depth,
        "COMPUTE": COMPUTE_TYPES[dtype],
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
