"""Add up what other programs have stored: a tile's logits, an image's peak, an episode's penalty, a head's deltas."""

import triton
import triton.language as tl

from rada_fast.kernels._common import store_column_sums


@triton.jit
def store_logits(
    logit_parts,
    logits,
    sums,
    scale,
    batch_row,
    valid,
    total_rows,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store the logits of a tile of rows and these divided by s, from PARTS parts of which PIECE are read at once."""
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, PARTS, PIECE):
        part = (first + tl.arange(0, PIECE))[:, None]
        offsets = part * tl.full((), total_rows, tl.int64) + batch_row[None, :]
        valid_parts = (part < PARTS) & valid[None, :]
        total += tl.sum(tl.load(logit_parts + offsets, mask=valid_parts, other=0.0, cache_modifier=".cg"), 0)
    store_column_sums(sums + batch_row, total, valid, PIECE, BLOCK_M)
    store_column_sums(logits + batch_row, total * scale, valid, PIECE, BLOCK_M)


@triton.jit
def store_row_peaks(
    values,
    columns,
    row_values,
    row_columns,
    batch_row,
    valid,
    total_rows,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store the largest |M - 1| of each row of a tile, and the first column that has it.

    values, columns: the largest of each of PARTS parts of a row, and its column.
    """
    largest = tl.full((PIECE, BLOCK_M), -1.0, tl.float32)
    place = tl.zeros((PIECE, BLOCK_M), tl.int32)
    for first in range(0, PARTS, PIECE):
        part = (first + tl.arange(0, PIECE))[:, None]
        offsets = part * tl.full((), total_rows, tl.int64) + batch_row[None, :]
        valid_parts = (part < PARTS) & valid[None, :]
        value = tl.load(values + offsets, mask=valid_parts, other=-1.0, cache_modifier=".cg")
        column = tl.load(columns + offsets, mask=valid_parts, other=0, cache_modifier=".cg")
        larger = value > largest
        largest = tl.where(larger, value, largest)
        place = tl.where(larger, column, place)
    peak = tl.max(largest, 0)
    # Of equal distances the first counts, as in torch.max.
    first_place = tl.min(tl.where(largest == peak[None, :], place, 0x7FFFFFFF), 0)
    store_column_sums(row_values + batch_row, peak, valid, PIECE, BLOCK_M)
    store_column_sums(row_columns + batch_row, first_place, valid, PIECE, BLOCK_M)


@triton.jit
def store_image_peak(
    row_values,
    row_columns,
    image_values,
    peaks,
    b,
    classes,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the largest |M - 1| of an image, and its place in the image's mask.

    row_values, row_columns: what store_row_peaks stored.
    """
    largest = tl.full((BLOCK,), -1.0, tl.float32)
    place = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(row_values + b * classes + k, mask=k < classes, other=-1.0, cache_modifier=".cg")
        column = tl.load(row_columns + b * classes + k, mask=k < classes, other=0, cache_modifier=".cg")
        larger = value > largest
        largest = tl.where(larger, value, largest)
        place = tl.where(larger, k.to(tl.int64) * D + column, place)
    peak = tl.max(largest, 0)
    tl.store(image_values + b, peak)
    # Of equal peaks the first counts, as in torch.max.
    tl.store(peaks + b, tl.min(tl.where(largest == peak, place, 0x7FFFFFFFFFFFFFFF), 0))


@triton.jit
def store_penalty(parts, penalty, first, count, divisor, BLOCK: tl.constexpr):
    """Store the sum of `count` parts of an episode's penalty, of which `first` is the first, over the divisor."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(parts + first + part, mask=part < count, other=0.0, cache_modifier=".cg")
    tl.store(penalty, (tl.sum(total, 0) / divisor).to(penalty.dtype.element_ty))


@triton.jit
def store_head_sums(
    parts,
    sums,
    batch_row,
    valid,
    total_rows,
    KIND: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store the sums of the parts of one query kind over the chunks of each head, for a tile of rows."""
    heads: tl.constexpr = D // HEAD
    chunks: tl.constexpr = HEAD // CHUNK
    head = tl.arange(0, triton.next_power_of_2(heads))[:, None]
    inside = (head < heads) & valid[None, :]
    rows = tl.full((), total_rows, tl.int64)
    total = tl.zeros(inside.shape, tl.float32)
    for chunk in tl.static_range(chunks):
        offsets = (KIND * (heads * chunks) + head * chunks + chunk) * rows + batch_row[None, :]
        total += tl.load(parts + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(sums + (KIND * heads + head) * rows + batch_row[None, :], total, mask=inside)
