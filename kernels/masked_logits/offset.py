"""Find the tile that a program owns, and compute 1 + A for it."""

from __future__ import annotations

import triton
import triton.language as tl

from rada_fast.kernels._common import product

STOPPED = tl.constexpr(-2.0)
"""What stands for the distance M - 1 of an element that relu has set to zero. All other distances under relu are at
least -1, also when they are rounded."""


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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return 1 + A for one tile of rows and the columns n."""
    _start, row, valid, _rows, classes, first_image = tile
    rows = attended + (first_image * classes + row)[:, None] * D
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        o = tl.load(rows + columns[None, :], mask=valid[:, None], other=0.0)
        w = tl.load(weight + n[None, :] * D + columns[:, None])
        accumulator = product(o, w.to(COMPUTE), accumulator, PRECISION)
    if bias is not None:
        accumulator += tl.load(bias + n).to(tl.float32)[None, :]
    return 1.0 + accumulator
