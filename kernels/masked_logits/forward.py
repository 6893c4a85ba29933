"""Forward pass of the masked logits; the package's docstring has the equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    cdiv,
    default_precision,
    episode_grid,
    rational_rows,
    store_chunk_sums,
    store_chunks,
)
from rada_fast.kernels._launch import Kernel
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.masked_logits.offset import common_arguments, one_plus_offset, program_tile
from rada_fast.kernels.masked_logits.tiles import CHUNK, PEAK_CHUNK, PENALTIES, Tile, tile_of


@Kernel
def masked_logits_forward_kernel(
    image,
    text,
    attended_text,
    attended_rational,
    attended_image,
    factors,
    weight,
    bias,
    logit_parts,
    penalty_parts,
    peak_values,
    peak_columns,
    mask,
    images,
    classes,
    total_rows,
    weight_stride,
    bias_stride,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    RELU: tl.constexpr,
    PENALTY: tl.constexpr,
    CHUNK: tl.constexpr,
    PEAK_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of the mask M, and its contributions to the logits and the penalty.

    Axis 0 of the grid: row tile and column block. Axis 1: episodes.
    """
    episode, n, block, tile = program_tile(images, classes, D, BLOCK_M, BLOCK_N)
    _start, row, valid, _rows, _classes, first_image = tile
    batch_row = first_image * classes + row
    if bias is not None:
        bias += episode * bias_stride
    m = one_plus_offset(
        (attended_text, attended_rational, attended_image, factors, total_rows), weight + episode * weight_stride, bias,
        tile, n, share, TWO_IMAGES, D, HEAD, BLOCK_M, BLOCK_N, BLOCK_C, COMPUTE, PRECISION,
    )  # fmt: skip
    if RELU:
        # tl.maximum would turn NaN into 0.
        m = tl.where(m <= 0.0, 0.0, m)
    r = rational_rows((image, text), tile, n, D, BLOCK_M, TWO_IMAGES)
    store_chunk_sums(logit_parts, m * r, block * (BLOCK_N // CHUNK), batch_row, total_rows, valid, CHUNK)
    distance = tl.where(valid[:, None], m - 1.0, 0.0)
    part = episode * tl.num_programs(0) + tl.program_id(0)
    if PENALTY == 1:
        tl.store(penalty_parts + part, tl.sum(distance * distance))
    elif PENALTY == 2:
        tl.store(penalty_parts + part, tl.sum(tl.abs(distance)))
    elif PENALTY == 3:
        chunks: tl.constexpr = BLOCK_N // PEAK_CHUNK
        size = tl.reshape(tl.abs(distance), (BLOCK_M, chunks, PEAK_CHUNK))
        value, column = tl.max(size, 2, return_indices=True, return_indices_tie_break_left=True)
        column += block * BLOCK_N + (tl.arange(0, chunks) * PEAK_CHUNK)[None, :]
        store_chunks(peak_values, value, block * chunks, batch_row, total_rows, valid, PEAK_CHUNK)
        store_chunks(peak_columns, column, block * chunks, batch_row, total_rows, valid, PEAK_CHUNK)
    if mask is not None:
        tl.store(mask + batch_row[:, None] * D + n[None, :], m.to(mask.dtype.element_ty), mask=valid[:, None])


@Kernel
def masked_logits_reduce_kernel(
    logit_scale,
    logit_parts,
    penalty_parts,
    peak_values,
    peak_columns,
    logits,
    sums,
    penalty,
    peaks,
    batch,
    images,
    classes,
    total_rows,
    parts,
    elements,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    PEAKS: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Add up the parts of the logits and of the penalty.

    Axis 0 of the grid: the images, for their logits, then the episodes, for their penalty.
    elements: the number of mask elements over which the penalty is a mean.
    BLOCK: four times the number of threads. Threads lie along the classes, so one thread adds up all parts of a class.
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
                offsets = (piece + part) * total_rows + first + k[None, :]
                valid = (piece + part < BLOCKS) & (k < classes)[None, :]
                total += tl.sum(tl.load(logit_parts + offsets, mask=valid, other=0.0), 0)
            tl.store(sums + first + k, total, mask=k < classes)
            tl.store(logits + first + k, (total * scale).to(logits.dtype.element_ty), mask=k < classes)
    elif PENALTY == 3:
        episode = program - batch
        mean = 0.0
        for image in range(images):
            b = (episode * images + image).to(tl.int64)
            largest = tl.full((PIECE, BLOCK), -1.0, tl.float32)
            place = tl.zeros((PIECE, BLOCK), tl.int64)
            for start in range(0, classes, BLOCK):
                k = (start + lane)[None, :]
                for piece in range(0, PEAKS, PIECE):
                    offsets = (piece + part) * total_rows + b * classes + k
                    valid = (piece + part < PEAKS) & (k < classes)
                    value = tl.load(peak_values + offsets, mask=valid, other=-1.0)
                    column = tl.load(peak_columns + offsets, mask=valid, other=0)
                    larger = value > largest
                    largest = tl.where(larger, value, largest)
                    place = tl.where(larger, k.to(tl.int64) * D + column, place)
            peak = tl.max(largest)
            # Of equal peaks the first counts, as in torch.max.
            first_place = tl.min(tl.where(largest == peak, place, 0x7FFFFFFFFFFFFFFF))
            tl.store(peaks + b, first_place)
            mean += peak
        tl.store(penalty + episode, (mean / images).to(penalty.dtype.element_ty))
    elif PENALTY > 0:
        episode = program - batch
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, parts, BLOCK):
            offsets = start + lane
            total += tl.load(penalty_parts + episode.to(tl.int64) * parts + offsets, mask=offsets < parts, other=0.0)
        tl.store(penalty + episode, (tl.sum(total, 0) / elements).to(penalty.dtype.element_ty))


@dataclass
class MaskedLogits:
    """Hold the results of the forward pass, None for a result that was not asked for.

    logits: (B, K), penalty: (E,) and mask: (B, K, D), in the features' dtype.
    sums: (B, K) float32, logits / s.
    peaks: (B,) int64, k D + c of the first element [k, c] where |M - 1| of an image is largest.
    """

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None
    sums: Tensor
    peaks: Tensor | None


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
    """Compute logits, the penalty of each episode and, if asked for, the mask, in two launches.

    image: (B, D).
    text: (K, D).
    attended: the results of class_attention_forward.
    weight: Wo, (D, D) or (E, D, D).
    bias: bo, (D,), (E, D) or None.

    The other arguments are those of rational_projections_forward.
    """
    (batch, width), classes = image.shape, text.shape[0]
    images = batch // episodes
    dtype = dtype or text.dtype
    tile = tile or tile_of(dtype, images * classes, width, width // num_heads)
    programs = (width // tile.columns) * cdiv(images * classes, tile.rows)
    kind = PENALTIES[penalty]
    float32 = {"dtype": torch.float32, "device": image.device}
    outputs = MaskedLogits(
        logits=image.new_empty((batch, classes)),
        # The mean over no images is zero.
        penalty=(image.new_empty if batch else image.new_zeros)((episodes,)) if kind else None,
        mask=image.new_empty((batch, classes, width)) if return_mask else None,
        sums=torch.empty((batch, classes), **float32),
        peaks=torch.empty((batch,), dtype=torch.int64, device=image.device) if kind == 3 else None,
    )
    if batch == 0:
        return outputs
    logit_parts = torch.empty((width // CHUNK, batch, classes), **float32)
    penalty_parts = torch.empty((episodes, programs), **float32) if kind in (1, 2) else None
    peak_values = torch.empty((width // PEAK_CHUNK, batch, classes), **float32) if kind == 3 else None
    peak_columns = torch.empty_like(peak_values, dtype=torch.int32) if peak_values is not None else None
    masked_logits_forward_kernel[episode_grid(programs, episodes=episodes)](
        **common_arguments(image, text, attended, weight, bias, num_heads, episodes, dtype, tile),
        logit_parts=logit_parts, penalty_parts=penalty_parts, peak_values=peak_values, peak_columns=peak_columns,
        mask=outputs.mask,
        RELU=relu, PENALTY=kind, CHUNK=CHUNK, PEAK_CHUNK=PEAK_CHUNK, PRECISION=default_precision(dtype, precision),
    )  # fmt: skip
    masked_logits_reduce_kernel[(batch + (episodes if kind else 0),)](
        logit_scale=logit_scale, logit_parts=logit_parts, penalty_parts=penalty_parts, peak_values=peak_values,
        peak_columns=peak_columns,
        logits=outputs.logits, sums=outputs.sums, penalty=outputs.penalty, peaks=outputs.peaks,
        batch=batch, images=images, classes=classes, total_rows=batch * classes, parts=programs,
        elements=float(images * classes * width),
        D=width, BLOCKS=width // CHUNK, PEAKS=width // PEAK_CHUNK, PENALTY=kind, BLOCK=512,
        PIECE=max(2, min(8 if kind == 3 else 16, triton.next_power_of_2(width // CHUNK))),
        num_warps=4,
    )  # fmt: skip
    return outputs
