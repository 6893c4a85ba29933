"""Backward pass of the masked logits; the package's docstring has the equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    block_of,
    cdiv,
    default_precision,
    episode_grid,
    episode_stride,
    is_last_to_finish,
    product,
    query_kind_rows,
    rational_rows,
    store_chunk_sums,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.masked_logits.offset import program_tile
from rada_fast.kernels.masked_logits.tiles import CHUNK, PENALTIES, Tile, tile_of
from rada_fast.kernels.masked_logits.totals import store_head_sums

OFFSET_ROWS, OFFSET_COLUMNS = 16, 128
"""The rows, and at most the columns, of a program that computes dA. No tile of dO has fewer rows."""


@Kernel
def masked_logits_backward_offset_kernel(
    image,
    text,
    logit_scale,
    dlogits,
    dpenalty,
    dmask,
    peaks,
    distances,
    doffset,
    weighted,
    counters,
    images,
    classes,
    elements,
    D: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    RELU: tl.constexpr,
    PENALTY: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute a tile of dA from the mask that the forward pass has stored.

    Axis 0 of the grid: row tile and column block. Axis 1: episodes.
    distances: see MaskedLogits; None if every mask is 1.
    counters: set to zero for the next launch, which has one for each tile of COUNTED rows.
    """
    episode, n, block, tile = program_tile(images, classes, D, BLOCK_M, BLOCK_N)
    start, row, valid, rows, _classes, first_image = tile
    if counters is not None:
        if (block == 0) & (start % COUNTED == 0):
            tl.store(counters + episode * ((rows + COUNTED - 1) // COUNTED) + start // COUNTED, 0)
    batch_row = first_image * classes + row
    offsets = batch_row[:, None] * D + n[None, :]
    distance = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if distances is not None:
        distance += tl.load(distances + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    stopped = distance < -1.0
    if RELU:
        distance = tl.where(stopped, -1.0, distance)
    dm = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dlogits is not None:
        g = tl.load(dlogits + batch_row, mask=valid, other=0.0).to(tl.float32) * tl.load(logit_scale)
        dm += g[:, None] * rational_rows((image, text), tile, n, D, BLOCK_M, TWO_IMAGES)
        if weighted is not None:
            m = g[:, None] * (1.0 + distance)
            tl.store(weighted + offsets, m.to(weighted.dtype.element_ty), mask=valid[:, None])
    elif weighted is not None:
        tl.store(weighted + offsets, dm.to(weighted.dtype.element_ty), mask=valid[:, None])
    if PENALTY > 0:
        d = tl.load(dpenalty + episode).to(tl.float32)
        sign = tl.where(distance > 0.0, 1.0, tl.where(distance < 0.0, -1.0, 0.0))
        if PENALTY == 1:
            dm += (2.0 * d / elements) * distance
        elif PENALTY == 2:
            dm += (d / elements) * sign
        else:
            peak = tl.load(peaks + first_image + row // classes, mask=valid, other=-1)
            is_peak = (row % classes).to(tl.int64)[:, None] * D + n[None, :] == peak[:, None]
            dm += tl.where(is_peak, sign * (d / images), 0.0)
    if dmask is not None:
        dm += tl.load(dmask + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
    if RELU:
        dm = tl.where(stopped, 0.0, dm)
    tl.store(doffset + offsets, dm.to(doffset.dtype.element_ty), mask=valid[:, None])


@Kernel
def masked_logits_backward_attended_kernel(
    attended_text,
    attended_rational,
    factors,
    weight,
    doffset,
    dattended,
    delta_parts,
    deltas,
    counters,
    images,
    classes,
    total_rows,
    weight_stride,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dO, and for each query kind c the sums of dO . w O^c over chunks of CHUNK columns.

    A chunk lies in one head. w are the factors of the matrix softmax and O^c is the attention's result. Where deltas
    is given, the last program of a tile of rows to finish adds up the chunks of each head.
    """
    one_head: tl.constexpr = HEAD % BLOCK_N == 0
    episode, n, block, tile = program_tile(images, classes, D, BLOCK_M, BLOCK_N)
    start, row, valid, _rows, _classes, first_image = tile
    first_column = block * BLOCK_N
    batch_row = first_image * classes + row
    weight += episode * weight_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x = tl.load(doffset + batch_row[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
        w = tl.load(weight + columns[:, None] * D + n[None, :])
        accumulator = product(x, w.to(COMPUTE), accumulator, PRECISION)
    # dO is rounded to the type in which later kernels read it: the sums of P (dP - delta) then cancel as they should.
    rounded = accumulator.to(dattended.dtype.element_ty)
    tl.store(dattended + batch_row[:, None] * D + n[None, :], rounded, mask=valid[:, None])
    do = rounded.to(tl.float32)
    chunk = first_column // CHUNK
    if attended_text is not None:
        o = query_kind_rows(attended_text, factors, batch_row, valid, n, first_column, total_rows, 0, D, HEAD, one_head)
        store_chunk_sums(delta_parts, do * o, chunk, batch_row, total_rows, valid, CHUNK)
    if attended_rational is not None:
        o = query_kind_rows(
            attended_rational, factors, batch_row, valid, n, first_column, total_rows, 1, D, HEAD, one_head
        )
        store_chunk_sums(delta_parts, do * o, D // CHUNK + chunk, batch_row, total_rows, valid, CHUNK)
    if deltas is not None:
        tiles = tl.num_programs(0) // (D // BLOCK_N)
        if is_last_to_finish(counters + episode * tiles + start // BLOCK_M, D // BLOCK_N):
            if attended_text is not None:
                store_head_sums(delta_parts, deltas, batch_row, valid, total_rows, 0, D, HEAD, CHUNK, BLOCK_M)
            if attended_rational is not None:
                store_head_sums(delta_parts, deltas, batch_row, valid, total_rows, 1, D, HEAD, CHUNK, BLOCK_M)


@dataclass
class MaskedLogitsGradients:
    """Hold the results of the backward pass, None for a result that was not asked for.

    doffset: dA, (B, K, D).
    dattended: dO, (B, K, D).
    deltas: (2, H, B, K) float32, the sums of dO . w O^c over a head's columns, text query first; for the matrix softmax
        (2, D/g, B, K), over chunks of g columns, where g divides a head's width.
    weighted: s dlogits M, (B, K, D).
    """

    doffset: Tensor
    dattended: Tensor | None
    deltas: Tensor | None
    weighted: Tensor | None


class _Launches(NamedTuple):
    """Hold the launches of dA and of dO, and the number of the latter's tiles of rows."""

    offset: Launch
    attended: Launch
    tiles: int


@remembered
def _backward_launches(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    relu: bool,
    penalty: int,
    episodes: int,
    weight_stride: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> _Launches:
    """Return the launches. penalty: a value of PENALTIES.

    weights: the type in which the weights lie in memory.
    """
    images, rows = batch // episodes, batch // episodes * classes
    tile = tile or tile_of(dtype, rows, width, backward=True, weights=weights, target=target)
    columns = block_of(width, OFFSET_COLUMNS)
    offset = masked_logits_backward_offset_kernel.launch(
        episode_grid(cdiv(rows, OFFSET_ROWS) * (width // columns), episodes=episodes),
        images=images, classes=classes, elements=float(rows * width),
        D=width, TWO_IMAGES=classes >= OFFSET_ROWS, RELU=relu, PENALTY=penalty, COUNTED=tile.rows,
        BLOCK_M=OFFSET_ROWS, BLOCK_N=columns, num_warps=4,
    )  # fmt: skip
    attended = masked_logits_backward_attended_kernel.launch(
        episode_grid(cdiv(rows, tile.rows) * (width // tile.columns), episodes=episodes),
        images=images, classes=classes, total_rows=batch * classes, weight_stride=weight_stride,
        D=width, HEAD=width // num_heads, CHUNK=block_of(width // num_heads, CHUNK),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth,
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision, target),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _Launches(offset, attended, episodes * cdiv(rows, tile.rows))


def masked_logits_backward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Attended,
    weight: Tensor,
    distances: Tensor | None,
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
    """Compute dA and dO in two launches; with weighted=True also s dlogits M, which the features' gradients need.

    distances: see MaskedLogits; None if every mask is 1.
    With inner=False this computes dA alone, in one launch: the output projection's own gradient needs no more.
    """
    (batch, width), classes = image.shape, text.shape[0]
    dtype = dtype or text.dtype
    shape, chunk = (batch, classes, width), block_of(width // num_heads, CHUNK)
    float32 = {"dtype": torch.float32, "device": image.device}
    gradients = MaskedLogitsGradients(
        doffset=image.new_empty(shape, dtype=dtype),
        dattended=image.new_empty(shape, dtype=dtype) if inner else None,
        deltas=torch.empty((2, width // chunk, batch, classes), **float32) if inner else None,
        weighted=image.new_empty(shape, dtype=dtype) if weighted else None,
    )
    if batch == 0:
        return gradients
    launches = _backward_launches(
        batch, classes, width, num_heads, relu, PENALTIES[penalty] if dpenalty is not None else 0, episodes,
        episode_stride(weight), dtype, weight.dtype, precision, target_of(image.device), tile,
    )  # fmt: skip
    deltas = counters = None
    if inner and attended.factors is None and width // num_heads > chunk:
        deltas = torch.empty((2, num_heads, batch, classes), **float32)
        counters = torch.empty((launches.tiles,), dtype=torch.int32, device=image.device)
    launches.offset(
        image=image, text=text, logit_scale=logit_scale, dlogits=dlogits, dpenalty=dpenalty, dmask=dmask, peaks=peaks,
        distances=distances, doffset=gradients.doffset, weighted=gradients.weighted, counters=counters,
    )  # fmt: skip
    if inner:
        launches.attended(
            attended_text=attended.text, attended_rational=attended.rational, factors=attended.factors, weight=weight,
            doffset=gradients.doffset, dattended=gradients.dattended, delta_parts=gradients.deltas, deltas=deltas,
            counters=counters,
        )  # fmt: skip
    if deltas is not None:
        gradients.deltas = deltas
    return gradients
