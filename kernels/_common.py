"""Helpers that several kernels share: rounding up, rows of (image, class) pairs, and operands computed on the fly.

A tile of rows belongs to one episode. Row r of an episode has its image r // K and its class r % K, so a tile may hold
rows of several images, and only the last tile of an episode has rows beyond the last one. Blocks of columns divide the
width, so columns need no mask.

The helpers take a tuple `tile` = (start, row, valid, rows, classes, first_image): the tile's first row, the row of each
of its lines, whether each of these rows exists, the episode's number of rows, K, and the episode's first image.

Scores and their log-sums include a factor log2(e), so exp2 takes the place of exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._shared_memory import Target

LOG2E = 1.4426950408889634

MAX_EPISODES = 65535
"""The most blocks that a CUDA grid may have along its second or its third axis, one of which counts the episodes."""

COMPUTE_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's name of each type in which products are computed."""


def block_of(width: int, most: int) -> int:
    """Return the largest power of two that divides width, at most `most`: a block of columns that needs no mask."""
    return min(most, width & -width)


def cdiv(whole: int, part: int) -> int:
    """Return whole / part, rounded up."""
    return -(-whole // part)


def episode_grid(*programs: int, episodes: int) -> tuple[int, ...]:
    """Return the grid of a launch whose last axis counts episodes. Raises ValueError for more than CUDA allows."""
    if episodes > MAX_EPISODES:
        raise ValueError(f"episodes must be at most {MAX_EPISODES}, got {episodes}")
    return (*programs, episodes)


def episode_stride(weight: Tensor | None) -> int:
    """Return the number of elements from one episode's weight to the next; 0 where all episodes share one weight."""
    return weight.stride(0) if weight is not None and weight.ndim == 3 else 0


def default_precision(dtype: torch.dtype, precision: str, target: Target) -> str:
    """Return the input_precision of tl.dot: the chosen one for float32, "ieee" for other types.

    "tf32" multiplies eleven bits of each operand, "tf32x3" adds three such products and is about as exact as float32,
    and "ieee" does not use tensor cores for float32. On Hopper six bfloat16 products, "bf16x6", take the place of three
    TF32 products. They take as long and are more exact. Hopper multiplies matrices of 32 bits only where they lie in
    shared memory in one of two orders, so that each use needs a copy, and matrices of 16 bits in both.
    """
    if dtype != torch.float32:
        return "ieee"
    return "bf16x6" if precision == "tf32x3" and target.is_hopper else precision


# Triton's interpreter stores bfloat16 as integers, and a product of such operands would multiply these integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, accumulator, PRECISION: tl.constexpr):
    """Return the matrix product of left and right in float32, added to the accumulator unless that is None."""
    if INTERPRETED:
        # NumPy adds up a float32 product in an order that depends on the sides of its operands. In float64 the order
        # does not show, so that scores are equal in all kernels.
        result = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        return result if accumulator is None else accumulator + result
    else:
        return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def operand(matrix, PRECISION: tl.constexpr):
    """Return what product_of multiplies: a matrix, or three matrices of bfloat16 for the precision "bf16x6".

    The three add up to the matrix exactly, because each rounds what the ones before it have left.
    """
    if PRECISION == "bf16x6" and not INTERPRETED:
        first = matrix.to(tl.bfloat16)
        rest = matrix - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        return first, second, third
    else:
        return matrix


@triton.jit
def transposed(parts, PRECISION: tl.constexpr):
    """Return the transposed operand. parts: as operand returns them."""
    if PRECISION == "bf16x6" and not INTERPRETED:
        return tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2])
    else:
        return tl.trans(parts)


@triton.jit
def product_of(left, right, accumulator, PRECISION: tl.constexpr, MIRRORED: tl.constexpr = False):
    """Return the product of two matrices as `product` does, where both are given as operand returns them.

    So a matrix of which several products are made is divided into its parts once.

    MIRRORED: whether to add up in the order in which the transposed product right^T left^T is added up, so that both
    have the same bits.
    """
    if PRECISION == "bf16x6" and not INTERPRETED:
        # The sum starts at 0 and ends with the largest product, so that what is small is not rounded away.
        if MIRRORED:
            result = tl.dot(left[0], right[2])
            result = tl.dot(left[1], right[1], result)
            result = tl.dot(left[0], right[1], result)
            result = tl.dot(left[2], right[0], result)
            result = tl.dot(left[1], right[0], result)
        else:
            result = tl.dot(left[2], right[0])
            result = tl.dot(left[1], right[1], result)
            result = tl.dot(left[1], right[0], result)
            result = tl.dot(left[0], right[2], result)
            result = tl.dot(left[0], right[1], result)
        result = tl.dot(left[0], right[0], result)
        return result if accumulator is None else accumulator + result
    else:
        return product(left, right, accumulator, PRECISION)


@triton.jit
def image_rows(image, tile, columns, D: tl.constexpr, BLOCK_M: tl.constexpr, TWO_IMAGES: tl.constexpr):
    """Return the features of each row's image, (BLOCK_M, columns).

    TWO_IMAGES says that K is at least BLOCK_M. The rows then belong to at most two images, and two vectors are read.
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
    """Return R[b, k] = f[b] * T[k] (Eq. 2) for a tile of rows, in float32. features: (image, text)."""
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
    """Return w O for one query kind, the attention's result O times its factors w, in float32.

    KIND: 0 for the text query, 1 for the rational query. factors: None for the row softmax, whose w is 1.
    ONE_HEAD says that all columns lie in one head, so a row has a single factor.
    """
    output = tl.load(attended + batch_row[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
    output = output.to(tl.float32)
    if factors is not None:
        if KIND == 1:
            # The rational query's factors follow the text query's.
            factors += (D // HEAD) * total_rows
        if ONE_HEAD:
            # The terms are added to the pointer one by one: a tile of 64-bit offsets takes registers and spills on
            # sm_100.
            output *= tl.load(factors + (first_column // HEAD) * total_rows + batch_row, mask=valid, other=0.0)[:, None]
        else:
            offsets = (columns // HEAD)[None, :] * total_rows + batch_row[:, None]
            output *= tl.load(factors + offsets, mask=valid[:, None], other=0.0)
    return output


@triton.jit
def input_scale(logit_scale, FACTOR: tl.constexpr):
    """Return the factor of R in the projections, 1 where FACTOR is 0; that of f and T is its square root."""
    if FACTOR == 0:
        return 1.0
    else:
        return tl.load(logit_scale) * FACTOR


@triton.jit
def arange_by_fours(WIDTH: tl.constexpr):
    """Return tl.arange(0, WIDTH), of which a thread has at most four consecutive numbers where WIDTH exceeds 128.

    Rows of bfloat16 then have the same layout as rows of float32.
    """
    if WIDTH > 128:
        return tl.max_contiguous(tl.arange(0, WIDTH), 4)
    else:
        return tl.arange(0, WIDTH)


@triton.jit
def store_column_sums(out, sums, valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store tl.sum(tile, 0), (BLOCK_N,), from the tile's own layout.

    If the sums were converted to another layout, every warp would write its copy to the same place in shared memory.
    """
    first_line = (tl.arange(0, BLOCK_M) == 0)[:, None]
    lines = tl.broadcast_to(sums.to(out.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_N))
    tl.store(tl.broadcast_to(out[None, :], (BLOCK_M, BLOCK_N)), lines, mask=first_line & valid[None, :])


@triton.jit
def store_chunks(out, values, first_chunk, row, stride, valid, CHUNK: tl.constexpr):
    """Store out[first_chunk + c, row] = values[row, c], where values were reduced over chunks of CHUNK columns.

    Of the threads that hold a chunk's value, one stores it.
    """
    rows: tl.constexpr = values.shape[0]
    chunks: tl.constexpr = values.shape[1]
    offsets = (first_chunk + tl.arange(0, chunks)).to(tl.int64)[None, :] * stride + row[:, None]
    stores = (tl.arange(0, CHUNK) == 0)[None, None, :] & valid[:, None, None]
    broadcast = tl.broadcast_to(values[:, :, None], (rows, chunks, CHUNK))
    tl.store(tl.broadcast_to((out + offsets)[:, :, None], (rows, chunks, CHUNK)), broadcast, mask=stores)


@triton.jit
def store_chunk_sums(out, values, first_chunk, row, stride, valid, CHUNK: tl.constexpr):
    """Store into out[first_chunk + c, row] the sum of the values' columns c CHUNK to (c + 1) CHUNK - 1."""
    rows: tl.constexpr = values.shape[0]
    chunks: tl.constexpr = values.shape[1] // CHUNK
    sums = tl.sum(tl.reshape(values, (rows, chunks, CHUNK)), 2)
    store_chunks(out, sums, first_chunk, row, stride, valid, CHUNK)


@triton.jit
def is_last_to_finish(counter, programs):
    """Count a program that has stored its results, and return whether all others of a group have done so before it.

    The last program can read what all of them have stored. Which one is the last differs from run to run, and what it
    computes does not, as it reads the results in a fixed order.

    counter: a pointer to the group's counter, which is zero before the launch. programs: the number of programs in the
    group.
    """
    # The counter is touched by one thread, whose release covers the stores of the others after a barrier.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
