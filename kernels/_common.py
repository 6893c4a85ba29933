"""Helpers of several kernels: rounding up, rows of (image, class) pairs, and operands that are computed, not read.

A tile of rows belongs to one episode. Row r of an episode is its image r // K and its class r % K, so that a tile may
hold rows of several images and only the episode's last tile has rows to spare. Blocks of columns divide the width, so
columns need no mask.

Two tuples pass through the helpers:

- `tile` = (start, row, valid, rows, classes, first_image): the tile's first row, the row of each of its lines, which of
  them exist, the episode's number of rows, K, and the episode's first image;
- `attended` = (text, rational, image, factors, total_rows): what class_attention_forward returns, None where a query
  kind or the matrix softmax is not in use, and the number of rows of all episodes.

Scores and their log-sums carry a factor log2(e), so that exp2 does what exp would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634

MOST_EPISODES = 65535
"""How many blocks a CUDA grid may have along its second and its third axis, of which one counts the episodes."""

COMPUTE_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's name of the type that products are made in."""


def block_of(width: int, most: int) -> int:
    """The largest power of two that divides width, at most `most`: a block of columns that needs no mask."""
    return min(most, width & -width)


def cdiv(whole: int, part: int) -> int:
    """whole / part, rounded up."""
    return -(-whole // part)


def episode_grid(*programs: int, episodes: int) -> tuple[int, ...]:
    """The grid of a launch whose last axis counts episodes. Raises ValueError for more of them than CUDA allows."""
    if episodes > MOST_EPISODES:
        raise ValueError(f"episodes must be at most {MOST_EPISODES}, got {episodes}")
    return (*programs, episodes)


def episode_stride(weight: Tensor | None) -> int:
    """The number of elements from one episode's weight to the next; 0 where all episodes share one weight."""
    return weight.stride(0) if weight is not None and weight.ndim == 3 else 0


def default_precision(dtype: torch.dtype, precision: str) -> str:
    """The input_precision of tl.dot. Only float32 has a choice: "tf32" multiplies eleven bits of each operand,
    "tf32x3" adds three such products and is about as exact as float32, "ieee" does without tensor cores."""
    return precision if dtype == torch.float32 else "ieee"


# Triton's interpreter multiplies bfloat16 as if the integers that hold it were the numbers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, accumulator, PRECISION: tl.constexpr):
    """The matrix product of left and right, added to the accumulator if there is one, in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def image_rows(image, tile, columns, D: tl.constexpr, BLOCK_M: tl.constexpr, TWO_IMAGES: tl.constexpr):
    """The features of each row's image, (BLOCK_M, columns).

    TWO_IMAGES says that K is at least BLOCK_M: the rows then belong to two images at most, and two vectors are read.
    """
    start, row, valid, rows, classes, first_image = tile
    if TWO_IMAGES:
        low = start // classes
        high = low + 1
        inside = high * classes < rows
        first = tl.load(image + (first_image + low) * D + columns)
        second = tl.load(image + (first_image + high) * D + columns, mask=columns < tl.where(inside, D, 0), other=0.0)
        return tl.where((row >= high * classes)[:, None], second[None, :], first[None, :])
    else:
        offsets = (first_image + row // classes) * D
        return tl.load(image + offsets[:, None] + columns[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def rational_rows(features, tile, columns, D: tl.constexpr, BLOCK_M: tl.constexpr, TWO_IMAGES: tl.constexpr):
    """R[b, k] = f[b] * T[k] (Eq. 2) for a tile of rows, in float32. features: (image, text)."""
    image, text = features
    _start, row, valid, _rows, classes, _first_image = tile
    t = tl.load(text + (row % classes)[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
    f = image_rows(image, tile, columns, D, BLOCK_M, TWO_IMAGES)
    return t.to(tl.float32) * f.to(tl.float32)


@triton.jit
def query_kind_rows(
    attended,
    factors,
    batch_row,
    valid,
    columns,
    first_column,
    total_rows,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    ONE_HEAD: tl.constexpr,
):
    """w O of one query kind (KIND 0: text, 1: rational) in float32; without factors, of the row softmax, w is 1.

    ONE_HEAD says that all columns lie in one head, so that a row has one factor.
    """
    output = tl.load(attended + batch_row[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
    output = output.to(tl.float32)
    if factors is not None:
        if KIND == 1:
            # The rational query's factors follow the text query's.
            factors += (D // HEAD) * total_rows
        if ONE_HEAD:
            # Added to the pointer one by one: 64-bit offsets of a tile take registers, and spill on sm_100.
            output *= tl.load(factors + (first_column // HEAD) * total_rows + batch_row, mask=valid, other=0.0)[:, None]
        else:
            offsets = (columns // HEAD)[None, :] * total_rows + batch_row[:, None]
            output *= tl.load(factors + offsets, mask=valid[:, None], other=0.0)
    return output


@triton.jit
def attended_rows(
    attended,
    tile,
    columns,
    first_column,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
):
    """O = (1/|Q|) sum_c w^c O^c for a tile of rows, in float32."""
    one_head: tl.constexpr = HEAD % BLOCK_C == 0
    text, rational, image, factors, total_rows = attended
    _start, row, valid, _rows, classes, first_image = tile
    batch_row = first_image * classes + row
    output = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if text is not None:
        output += query_kind_rows(
            text, factors, batch_row, valid, columns, first_column, total_rows, 0, D, HEAD, one_head
        )
    if rational is not None:
        output += query_kind_rows(
            rational, factors, batch_row, valid, columns, first_column, total_rows, 1, D, HEAD, one_head
        )
    if image is not None:
        output += image_rows(image, tile, columns, D, BLOCK_M, TWO_IMAGES)
    return output * share


@triton.jit
def input_scale(logit_scale, FACTOR: tl.constexpr):
    """What R is multiplied by before the projections, 1 where FACTOR is 0; f and T carry its square root."""
    if FACTOR == 0:
        return 1.0
    else:
        return tl.load(logit_scale) * FACTOR


@triton.jit
def arange_by_fours(WIDTH: tl.constexpr):
    """tl.arange(0, WIDTH) of which a thread takes at most four numbers where one warp cannot hold them all, so that
    rows of bfloat16 are laid out as rows of float32 are."""
    if WIDTH > 128:
        return tl.max_contiguous(tl.arange(0, WIDTH), 4)
    else:
        return tl.arange(0, WIDTH)


@triton.jit
def store_column_sums(out, sums, valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store tl.sum(tile, 0), (BLOCK_N,), from the tile's own layout. Converted to a layout of its own, every warp would
    write its copy of the sums to the same place in shared memory."""
    first_line = (tl.arange(0, BLOCK_M) == 0)[:, None]
    lines = tl.broadcast_to(sums.to(out.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_N))
    tl.store(tl.broadcast_to(out[None, :], (BLOCK_M, BLOCK_N)), lines, mask=first_line & valid[None, :])


@triton.jit
def store_chunks(out, values, first_chunk, row, stride, valid, CHUNK: tl.constexpr):
    """out[first_chunk + c, row] = values[row, c], which were reduced over chunks of CHUNK columns; of the threads that
    hold a chunk one stores."""
    rows: tl.constexpr = values.shape[0]
    chunks: tl.constexpr = values.shape[1]
    offsets = (first_chunk + tl.arange(0, chunks)).to(tl.int64)[None, :] * stride + row[:, None]
    stores = (tl.arange(0, CHUNK) == 0)[None, None, :] & valid[:, None, None]
    broadcast = tl.broadcast_to(values[:, :, None], (rows, chunks, CHUNK))
    tl.store(tl.broadcast_to((out + offsets)[:, :, None], (rows, chunks, CHUNK)), broadcast, mask=stores)


@triton.jit
def store_chunk_sums(out, values, first_chunk, row, stride, valid, CHUNK: tl.constexpr):
    """out[first_chunk + c, row] = the sum of the values' columns c CHUNK to (c + 1) CHUNK - 1."""
    rows: tl.constexpr = values.shape[0]
    chunks: tl.constexpr = values.shape[1] // CHUNK
    sums = tl.sum(tl.reshape(values, (rows, chunks, CHUNK)), 2)
    store_chunks(out, sums, first_chunk, row, stride, valid, CHUNK)
