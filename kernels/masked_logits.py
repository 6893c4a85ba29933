"""Output projection, mask, masked logits and mask penalty (RAda, arXiv:2507.15480, Eq. 4 and 7).

    A = O Wo^T + bo,   M = relu(1 + A) or 1 + A,   logits[b, k] = s sum_c M[b, k, c] R[b, k, c]
    dA = (s dlogits R + dL_s/dM) 1[1 + A > 0 or no relu],   dO = dA Wo

A program owns a tile of rows and a block of columns of A; O is combined and R formed in the prologue and the epilogue.
A and M never reach memory unless the mask is asked for: the backward makes A again. What is summed over columns leaves
as one part for each chunk of columns; a second launch adds the parts in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    attended_rows,
    block_of,
    cdiv,
    default_precision,
    episode_stride,
    kind_rows,
    product,
    rational_rows,
    store_chunk_sums,
    store_chunks,
)
from rada_fast.kernels.class_attention import Attended

CHUNK = 32
"""Columns of which one part of a logit is made: a block of columns holds whole ones."""
PEAK_CHUNK = 8
"""Columns of which one candidate for the linf penalty's peak comes: of more than a tensor core's, each of several warps
would hold the peak."""

PENALTIES = {"none": 0, "l2": 1, "l1": 2, "linf": 3}


@dataclass(frozen=True)
class Tile:
    """Rows, columns and reduction of a product's tile; warps; pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, rows: int, width: int, head: int, *, backward: bool = False) -> Tile:
    """The table. rows: of one episode, n K. A step of the reduction stays inside a head, which has one factor."""
    if dtype == torch.float32:
        # As in class_attention: short reductions, one stage.
        return Tile(64, block_of(width, 64), 16, 4, 1)
    depth = max(16, block_of(head, 64))
    if rows <= 512:
        return Tile(64, block_of(width, 32), depth, 4, 3)
    if backward:
        # Four warps: with eight, Blackwell leaves 128 registers a thread, and the mask's backward spills. Heads of 128
        # spill there at 64 columns too.
        return Tile(64, block_of(width, 32 if head > 96 else 64), depth, 4, 3)
    # Eight warps: at four the epilogue, which holds A and R at once, spills.
    return Tile(128, block_of(width, 64), depth, 8, 3)


@triton.jit
def _one_plus_offset(
    attended_text, attended_rational, attended_image, factors, weight, bias,
    first_row, first_image, first, row, ok, rows, n, classes, total_rows, share,
    D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, IMAGE: tl.constexpr,
    MATRIX: tl.constexpr, BIAS: tl.constexpr, TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """1 + A of one tile."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        o = attended_rows(
            attended_text, attended_rational, attended_image, factors, first_row, first_image, first, row, ok, rows,
            classes, total_rows, c, columns, share, D, HEAD, BLOCK_M, BLOCK_C, TWO, TEXT, RATIONAL, IMAGE, MATRIX,
        )  # fmt: skip
        w = tl.load(weight + n[None, :] * D + columns[:, None])
        acc = product(o.to(COMPUTE), w.to(COMPUTE), acc, PRECISION)
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    return 1.0 + acc


@triton.jit
def masked_logits_forward_kernel(
    image, text, attended_text, attended_rational, attended_image, factors, weight, bias,
    logit_parts, penalty_parts, peak_values, peak_columns, mask,
    images, classes, total_rows, w_stride, b_stride, share,
    D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, IMAGE: tl.constexpr,
    MATRIX: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PENALTY: tl.constexpr, MASK: tl.constexpr,
    CHUNK: tl.constexpr, PEAK_CHUNK: tl.constexpr, TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Axis 0: row tile and column block, neighbours share rows. Axis 1: episodes."""
    blocks: tl.constexpr = D // BLOCK_N
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = program % blocks
    first = (program // blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    rows = images * classes
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = row < rows
    first_image = episode * images
    first_row = first_image * classes
    if BIAS:
        bias += episode * b_stride
    m = _one_plus_offset(
        attended_text, attended_rational, attended_image, factors, weight + episode * w_stride, bias,
        first_row, first_image, first, row, ok, rows, n, classes, total_rows, share,
        D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, BIAS, TWO, BLOCK_M, BLOCK_N, BLOCK_C, COMPUTE, PRECISION,
    )  # fmt: skip
    if RELU:
        # Not a maximum: that would turn NaN into 0.
        m = tl.where(m <= 0.0, 0.0, m)
    r = rational_rows(image, text, first_image, first, row, ok, rows, classes, n, D, BLOCK_M, TWO)
    at = first_row + row
    store_chunk_sums(logit_parts, m * r, block * (BLOCK_N // CHUNK), at, total_rows, ok, BLOCK_M, BLOCK_N, CHUNK)
    distance = tl.where(ok[:, None], m - 1.0, 0.0)
    here = episode * tl.num_programs(0) + program
    if PENALTY == 1:
        tl.store(penalty_parts + here, tl.sum(distance * distance))
    elif PENALTY == 2:
        tl.store(penalty_parts + here, tl.sum(tl.abs(distance)))
    elif PENALTY == 3:
        chunks: tl.constexpr = BLOCK_N // PEAK_CHUNK
        size = tl.reshape(tl.abs(distance), (BLOCK_M, chunks, PEAK_CHUNK))
        value, place = tl.max(size, 2, return_indices=True, return_indices_tie_break_left=True)
        place += block * BLOCK_N + (tl.arange(0, chunks) * PEAK_CHUNK)[None, :]
        store_chunks(peak_values, value, block * chunks, at, total_rows, ok, BLOCK_M, BLOCK_N, PEAK_CHUNK)
        store_chunks(peak_columns, place, block * chunks, at, total_rows, ok, BLOCK_M, BLOCK_N, PEAK_CHUNK)
    if MASK:
        tl.store(mask + (first_row + row)[:, None] * D + n[None, :], m.to(mask.dtype.element_ty), mask=ok[:, None])


@triton.jit
def masked_logits_reduce_kernel(
    logit_parts, penalty_parts, peak_values, peak_columns, logit_scale, logits, sums, penalty, peaks,
    batch, images, classes, total_rows, parts, elements,
    D: tl.constexpr, BLOCKS: tl.constexpr, PEAKS: tl.constexpr, PENALTY: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Axis 0: an image's logits, then an episode's penalty. elements: that the penalty's mean is over.

    BLOCK is four times the threads: they lie along the classes, so that a class's parts are added up in one of them.
    """
    program = tl.program_id(0)
    lane, part = tl.arange(0, BLOCK), tl.arange(0, PIECE)[:, None]
    if program < batch:
        scale = tl.load(logit_scale).to(tl.float32)
        first = program.to(tl.int64) * classes
        for start in range(0, classes, BLOCK):
            k = start + lane
            total = tl.zeros((BLOCK,), tl.float32)
            for piece in range(0, BLOCKS, PIECE):
                there = (piece + part) * total_rows + first + k[None, :]
                ok = (piece + part < BLOCKS) & (k < classes)[None, :]
                total += tl.sum(tl.load(logit_parts + there, mask=ok, other=0.0), 0)
            tl.store(sums + first + k, total, mask=k < classes)
            tl.store(logits + first + k, (total * scale).to(logits.dtype.element_ty), mask=k < classes)
    elif PENALTY == 3:
        episode = program - batch
        mean = 0.0
        for image in range(images):
            b = (episode * images + image).to(tl.int64)
            best = tl.full((PIECE, BLOCK), -1.0, tl.float32)
            where = tl.zeros((PIECE, BLOCK), tl.int64)
            for start in range(0, classes, BLOCK):
                k = (start + lane)[None, :]
                for piece in range(0, PEAKS, PIECE):
                    there = (piece + part) * total_rows + b * classes + k
                    ok = (piece + part < PEAKS) & (k < classes)
                    value = tl.load(peak_values + there, mask=ok, other=-1.0)
                    column = tl.load(peak_columns + there, mask=ok, other=0)
                    better = value > best
                    best = tl.where(better, value, best)
                    where = tl.where(better, k.to(tl.int64) * D + column, where)
            peak = tl.max(best)
            # Of equal peaks the first counts, as in torch.max.
            first_of = tl.min(tl.where(best == peak, where, 0x7FFFFFFFFFFFFFFF))
            tl.store(peaks + b, first_of)
            mean += peak
        tl.store(penalty + episode, (mean / images).to(penalty.dtype.element_ty))
    elif PENALTY > 0:
        episode = program - batch
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, parts, BLOCK):
            at = start + lane
            total += tl.load(penalty_parts + episode.to(tl.int64) * parts + at, mask=at < parts, other=0.0)
        tl.store(penalty + episode, (tl.sum(total, 0) / elements).to(penalty.dtype.element_ty))


@dataclass
class MaskedLogits:
    """logits (B, K), penalty (E,), mask (B, K, D) in the features' dtype; sums (B, K) float32, logits / s; peaks (B,)
    int64, where |M - 1| of an image is largest, k D + c."""

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None
    sums: Tensor
    peaks: Tensor | None


def _options(attended: Attended, num_heads: int, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> dict:
    kinds = [attended.text is not None, attended.rational is not None, attended.image is not None]
    return {
        "D": weight.shape[-1], "HEAD": weight.shape[-1] // num_heads, "TEXT": kinds[0], "RATIONAL": kinds[1],
        "IMAGE": kinds[2], "MATRIX": attended.factors is not None, "BIAS": bias is not None,
        "COMPUTE": _TYPES[dtype],
    }  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def masked_logits_forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Attended,
    weight: Tensor,
    bias: Tensor | None,
    *,
    num_heads: int,
    relu: bool,
    penalty: str = "none",
    return_mask: bool = False,
    episodes: int = 1,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> MaskedLogits:
    """Logits, penalty of each episode and, if asked for, the mask, in two launches.

    image: (B, D); text: (K, D); weight: Wo, (D, D) or (E, D, D); bias: (D,), (E, D) or None; other arguments as in
    rational_projections_forward.
    """
    (batch, width), classes = image.shape, text.shape[0]
    images, rows = batch // episodes, batch * classes
    dtype = dtype or text.dtype
    tile = tile or tile_of(dtype, images * classes, width, width // num_heads)
    blocks, tiles = width // tile.columns, cdiv(images * classes, tile.rows)
    kind = PENALTIES[penalty]
    exact = {"dtype": torch.float32, "device": image.device}
    made = MaskedLogits(
        image.new_empty((batch, classes)),
        image.new_zeros((episodes,)) if kind and batch == 0 else image.new_empty((episodes,)) if kind else None,
        image.new_empty((batch, classes, width)) if return_mask else None,
        torch.empty((batch, classes), **exact),
        torch.empty((batch,), dtype=torch.int64, device=image.device) if kind == 3 else None,
    )
    if batch == 0:
        return made
    parts, candidates = width // CHUNK, width // PEAK_CHUNK
    logit_parts = torch.empty((parts, batch, classes), **exact)
    penalty_parts = torch.empty((episodes, tiles * blocks), **exact) if kind in (1, 2) else None
    peak_values = torch.empty((candidates, batch, classes), **exact) if kind == 3 else None
    peak_columns = torch.empty_like(peak_values, dtype=torch.int32) if peak_values is not None else None
    options = _options(attended, num_heads, weight, bias, dtype)
    share = 1 / sum(part is not None for part in (attended.text, attended.rational, attended.image))
    masked_logits_forward_kernel[(tiles * blocks, episodes)](
        image, text, attended.text, attended.rational, attended.image, attended.factors, weight, bias,
        logit_parts, penalty_parts, peak_values, peak_columns, made.mask,
        images, classes, rows, episode_stride(weight), width if episode_stride(weight) else 0, share,
        **options, CHUNK=CHUNK, PEAK_CHUNK=PEAK_CHUNK, RELU=relu, PENALTY=kind, MASK=return_mask,
        TWO=classes >= tile.rows, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth,
        PRECISION=default_precision(dtype, precision), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    masked_logits_reduce_kernel[(batch + (episodes if kind else 0),)](
        logit_parts, penalty_parts, peak_values, peak_columns, logit_scale, made.logits, made.sums, made.penalty,
        made.peaks, batch, images, classes, rows, tiles * blocks, float(images * classes * width),
        D=width, BLOCKS=parts, PEAKS=candidates, PENALTY=kind, BLOCK=512,
        PIECE=max(2, min(8 if kind == 3 else 16, triton.next_power_of_2(parts))),
        num_warps=4,
    )  # fmt: skip
    return made


@triton.jit
def masked_logits_backward_offset_kernel(
    image, text, logit_scale, attended_text, attended_rational, attended_image, factors, weight, bias,
    dlogits, dpenalty, dmask, peaks, doffset, weighted,
    images, classes, total_rows, w_stride, b_stride, share, elements,
    D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, IMAGE: tl.constexpr,
    MATRIX: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PENALTY: tl.constexpr, LOGITS: tl.constexpr,
    MASK: tl.constexpr, WEIGHTED: tl.constexpr, TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA, from A made again; programs as in the forward."""
    blocks: tl.constexpr = D // BLOCK_N
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = (program // blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    rows = images * classes
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = row < rows
    first_image = episode * images
    first_row = first_image * classes
    if BIAS:
        bias += episode * b_stride
    m = _one_plus_offset(
        attended_text, attended_rational, attended_image, factors, weight + episode * w_stride, bias,
        first_row, first_image, first, row, ok, rows, n, classes, total_rows, share,
        D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, BIAS, TWO, BLOCK_M, BLOCK_N, BLOCK_C, COMPUTE, PRECISION,
    )  # fmt: skip
    at = (first_row + row)[:, None] * D + n[None, :]
    cut = m <= 0.0
    if RELU:
        m = tl.where(cut, 0.0, m)
    dm = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LOGITS:
        g = tl.load(dlogits + first_row + row, mask=ok, other=0.0).to(tl.float32) * tl.load(logit_scale)
        dm += g[:, None] * rational_rows(image, text, first_image, first, row, ok, rows, classes, n, D, BLOCK_M, TWO)
        if WEIGHTED:
            tl.store(weighted + at, (g[:, None] * m).to(weighted.dtype.element_ty), mask=ok[:, None])
    elif WEIGHTED:
        tl.store(weighted + at, dm.to(weighted.dtype.element_ty), mask=ok[:, None])
    if PENALTY > 0:
        d = tl.load(dpenalty + episode).to(tl.float32)
        distance = m - 1.0
        sign = tl.where(distance > 0.0, 1.0, tl.where(distance < 0.0, -1.0, 0.0))
        if PENALTY == 1:
            dm += (2.0 * d / elements) * distance
        elif PENALTY == 2:
            dm += (d / elements) * sign
        else:
            peak = tl.load(peaks + first_image + row // classes, mask=ok, other=-1)
            here = (row % classes).to(tl.int64)[:, None] * D + n[None, :] == peak[:, None]
            dm += tl.where(here, sign * (d / images), 0.0)
    if MASK:
        dm += tl.load(dmask + at, mask=ok[:, None], other=0.0).to(tl.float32)
    if RELU:
        dm = tl.where(cut, 0.0, dm)
    tl.store(doffset + at, dm.to(doffset.dtype.element_ty), mask=ok[:, None])


@triton.jit
def masked_logits_backward_attended_kernel(
    doffset, attended_text, attended_rational, factors, weight, dattended, deltas,
    images, classes, total_rows, w_stride,
    D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, MATRIX: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO, and dO . w O^c over chunks of CHUNK columns, each inside a head."""
    blocks: tl.constexpr = D // BLOCK_N
    one_head: tl.constexpr = HEAD % BLOCK_N == 0
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (program // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (program % blocks) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    ok = row < images * classes
    at = episode * images * classes + row
    weight += episode * w_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x = tl.load(doffset + at[:, None] * D + columns[None, :], mask=ok[:, None], other=0.0)
        w = tl.load(weight + columns[:, None] * D + n[None, :])
        acc = product(x, w.to(COMPUTE), acc, PRECISION)
    tl.store(dattended + at[:, None] * D + n[None, :], acc.to(dattended.dtype.element_ty), mask=ok[:, None])
    # Rounded as those who read it see it: the sums of P (dP - delta) then cancel as they should.
    acc = acc.to(dattended.dtype.element_ty).to(tl.float32)
    chunk = start // CHUNK
    if TEXT:
        o = kind_rows(attended_text, factors, at, ok, start, n, total_rows, D, HEAD, MATRIX, one_head)
        store_chunk_sums(deltas, acc * o, chunk, at, total_rows, ok, BLOCK_M, BLOCK_N, CHUNK)
    if RATIONAL:
        own = factors
        if MATRIX:
            own = factors + (D // HEAD) * total_rows
        o = kind_rows(attended_rational, own, at, ok, start, n, total_rows, D, HEAD, MATRIX, one_head)
        chunk += D // CHUNK
        store_chunk_sums(deltas, acc * o, chunk, at, total_rows, ok, BLOCK_M, BLOCK_N, CHUNK)


@dataclass
class MaskedLogitsGradients:
    """doffset dA, dattended dO: (B, K, D); deltas: (2, D/g, B, K) float32, g a divisor of a head's width; weighted:
    s dlogits M, (B, K, D)."""

    doffset: Tensor
    dattended: Tensor | None
    deltas: Tensor | None
    weighted: Tensor | None


def masked_logits_backward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Attended,
    weight: Tensor,
    bias: Tensor | None,
    dlogits: Tensor | None,
    dpenalty: Tensor | None,
    dmask: Tensor | None,
    peaks: Tensor | None,
    *,
    num_heads: int,
    relu: bool,
    penalty: str = "none",
    weighted: bool = False,
    inner: bool = True,
    episodes: int = 1,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> MaskedLogitsGradients:
    """dA and dO in two launches; with weighted=True also s dlogits M, which the features' gradients need.

    inner=False: dA alone, all that the output projection's own gradient needs, in one launch.
    """
    (batch, width), classes = image.shape, text.shape[0]
    head = width // num_heads
    images, rows = batch // episodes, batch * classes
    dtype = dtype or text.dtype
    tile = tile or tile_of(dtype, images * classes, width, head, backward=True)
    shape, chunk = (batch, classes, width), block_of(head, CHUNK)
    made = MaskedLogitsGradients(
        image.new_empty(shape, dtype=dtype),
        image.new_empty(shape, dtype=dtype) if inner else None,
        torch.empty((2, width // chunk, batch, classes), dtype=torch.float32, device=image.device) if inner else None,
        image.new_empty(shape, dtype=dtype) if weighted else None,
    )
    if batch == 0:
        return made
    options = _options(attended, num_heads, weight, bias, dtype)
    share = 1 / (options["TEXT"] + options["RATIONAL"] + options["IMAGE"])
    grid = (cdiv(images * classes, tile.rows) * (width // tile.columns), episodes)
    precision = default_precision(dtype, precision)
    masked_logits_backward_offset_kernel[grid](
        image, text, logit_scale, attended.text, attended.rational, attended.image, attended.factors, weight, bias,
        dlogits, dpenalty, dmask, peaks, made.doffset, made.weighted,
        images, classes, rows, episode_stride(weight), width if episode_stride(weight) else 0, share,
        float(images * classes * width),
        **options, RELU=relu, PENALTY=PENALTIES[penalty] if dpenalty is not None else 0, LOGITS=dlogits is not None,
        MASK=dmask is not None, WEIGHTED=weighted, TWO=classes >= tile.rows,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not inner:
        return made
    del options["BIAS"], options["IMAGE"]
    masked_logits_backward_attended_kernel[grid](
        made.doffset, attended.text, attended.rational, attended.factors, weight, made.dattended, made.deltas,
        images, classes, rows, episode_stride(weight),
        **options, CHUNK=chunk, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_C=block_of(width, 64 if dtype != torch.float32 else 32), PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made
