"""What every kernel file shares: rounding, rows of (image, class), the two operands that are made instead of read.

Rows. A tile of rows belongs to one episode; row r of it is image r // K and class r % K of that episode, so that tiles
run over images without a tail for each. Columns need no mask: blocks of columns divide the width.

Base 2. Scores and their log-sums carry a factor log2(e), so that exp2 does what exp would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


def block_of(width: int, most: int) -> int:
    """The largest power of two that divides width, at most `most`: a block of columns that needs no mask."""
    return min(most, width & -width)


def cdiv(whole: int, part: int) -> int:
    return -(-whole // part)


def episode_stride(weight: Tensor | None) -> int:
    """Elements from one episode's weight to the next; 0 where all episodes share one."""
    return weight.stride(0) if weight is not None and weight.ndim == 3 else 0


def default_precision(dtype: torch.dtype, precision: str) -> str:
    """tl.dot's input_precision. Only float32 has a choice: "tf32" multiplies what eleven bits hold of each operand,
    "tf32x3" adds three such products up to one about as exact as float32's own, "ieee" does without tensor cores."""
    return precision if dtype == torch.float32 else "ieee"


# Triton's interpreter multiplies bfloat16 as the integers that hold it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """left right, added to total where that is not None, accumulated in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def image_rows(
    image, first_image, first, row, ok, rows, classes, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Features of each row's image, (BLOCK_M, columns). TWO: K is at least BLOCK_M, so that rows span two images at
    most and two vectors serve them all. first: the tile's first row; rows: the episode's."""
    if TWO:
        low = first // classes
        high = low + 1
        inside = high * classes < rows
        first = tl.load(image + (first_image + low) * D + columns)
        second = tl.load(image + (first_image + high) * D + columns, mask=columns < tl.where(inside, D, 0), other=0.0)
        return tl.where((row >= high * classes)[:, None], second[None, :], first[None, :])
    else:
        at = (first_image + row // classes) * D
        return tl.load(image + at[:, None] + columns[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def rational_rows(
    image, text, first_image, first, row, ok, rows, classes, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """R[b, k] = f[b] * T[k] of a tile's rows (Eq. 2), in float32."""
    t = tl.load(text + (row % classes)[:, None] * D + columns[None, :], mask=ok[:, None], other=0.0)
    f = image_rows(image, first_image, first, row, ok, rows, classes, columns, D, BLOCK_M, TWO)
    return t.to(tl.float32) * f.to(tl.float32)


@triton.jit
def kind_rows(
    attended, factors, at, ok, start, columns, total_rows, D: tl.constexpr, HEAD: tl.constexpr, MATRIX: tl.constexpr,
    ONE_HEAD: tl.constexpr,
):  # fmt: skip
    """w O of one query kind, in float32; w = 1 for the row softmax. ONE_HEAD: all columns lie in one head."""
    part = tl.load(attended + at[:, None] * D + columns[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    if MATRIX:
        if ONE_HEAD:
            part *= tl.load(factors + (start // HEAD) * total_rows + at, mask=ok, other=0.0)[:, None]
        else:
            there = (columns // HEAD)[None, :] * total_rows + at[:, None]
            part *= tl.load(factors + there, mask=ok[:, None], other=0.0)
    return part


@triton.jit
def attended_rows(
    attended_text, attended_rational, attended_image, factors,
    first_row, first_image, first, row, ok, rows, classes, total_rows, start, columns, share,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, TWO: tl.constexpr,
    TEXT: tl.constexpr, RATIONAL: tl.constexpr, IMAGE: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """O = (1/|Q|) sum_c w^c O^c of a tile's rows, in float32."""
    one_head: tl.constexpr = HEAD % BLOCK_C == 0
    at = first_row + row
    out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if TEXT:
        out += kind_rows(attended_text, factors, at, ok, start, columns, total_rows, D, HEAD, MATRIX, one_head)
    if RATIONAL:
        # The rational query's factors follow the text query's.
        own = factors
        if MATRIX:
            own = factors + (D // HEAD) * total_rows
        out += kind_rows(attended_rational, own, at, ok, start, columns, total_rows, D, HEAD, MATRIX, one_head)
    if IMAGE:
        out += image_rows(attended_image, first_image, first, row, ok, rows, classes, columns, D, BLOCK_M, TWO)
    return out * share


@triton.jit
def input_scale(logit_scale, FACTOR: tl.constexpr):
    """What R is multiplied by before the projections; f and T carry its square root. FACTOR 0: nothing."""
    if FACTOR == 0:
        return 1.0
    else:
        return tl.load(logit_scale) * FACTOR


@triton.jit
def quads(WIDTH: tl.constexpr):
    """0 .. WIDTH, of which a thread takes four at most where a warp does not hold them all: bfloat16's rows then have
    float32's layout."""
    if WIDTH > 128:
        return tl.max_contiguous(tl.arange(0, WIDTH), 4)
    else:
        return tl.arange(0, WIDTH)


@triton.jit
def store_column_sums(out, sums, ok, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store tl.sum(tile, 0), (BLOCK_N,), from the tile's own layout. Converted to a layout of its own, every warp would
    write its copy of the sums to the same place in shared memory."""
    first = (tl.arange(0, BLOCK_M) == 0)[:, None]
    tile = tl.broadcast_to(sums.to(out.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_N))
    tl.store(tl.broadcast_to(out[None, :], (BLOCK_M, BLOCK_N)), tile, mask=first & ok[None, :])


@triton.jit
def store_chunks(
    out, values, chunk, row, stride, ok, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """out[chunk + c, row] = values[row, c], reduced over chunks of CHUNK columns; one lane of a chunk stores."""
    chunks: tl.constexpr = BLOCK_N // CHUNK
    at = (chunk + tl.arange(0, chunks)).to(tl.int64)[None, :] * stride + row[:, None]
    only = (tl.arange(0, CHUNK) == 0)[None, None, :] & ok[:, None, None]
    spread = tl.broadcast_to(values[:, :, None], (BLOCK_M, chunks, CHUNK))
    tl.store(tl.broadcast_to((out + at)[:, :, None], (BLOCK_M, chunks, CHUNK)), spread, mask=only)


@triton.jit
def store_chunk_sums(
    out, tile, chunk, row, stride, ok, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):
    """out[chunk + c, row] = sum of tile's columns c CHUNK .. (c + 1) CHUNK."""
    sums = tl.sum(tl.reshape(tile, (BLOCK_M, BLOCK_N // CHUNK, CHUNK)), 2)
    store_chunks(out, sums, chunk, row, stride, ok, BLOCK_M, BLOCK_N, CHUNK)
