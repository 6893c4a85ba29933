"""Forward pass of the masked logits; the package's docstring has the equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    cdiv,
    default_precision,
    episode_grid,
    episode_stride,
    is_last_to_finish,
    rational_rows,
    store_chunk_sums,
    store_chunks,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.masked_logits.offset import STOPPED, one_plus_offset, program_tile
from rada_fast.kernels.masked_logits.tiles import CHUNK, MIN_ROWS, PEAK_CHUNK, PENALTIES, Tile, tile_of
from rada_fast.kernels.masked_logits.totals import (
    store_image_peak,
    store_logits,
    store_penalty,
    store_row_peaks,
)


@Kernel
def masked_logits_forward_kernel(
    image,
    text,
    attended,
    weight,
    bias,
    logit_scale,
    logit_parts,
    penalty_parts,
    peak_values,
    peak_columns,
    row_values,
    row_columns,
    image_values,
    logits,
    sums,
    penalty,
    peaks,
    mask,
    distances,
    counters,
    images,
    classes,
    total_rows,
    weight_stride,
    bias_stride,
    elements,
    D: tl.constexpr,
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

    Of the programs that share a tile's rows, the last one to finish adds up their logits. For the linf penalty the last
    one of an image finds its peak, the largest |M - 1|. The last one of an episode adds up the penalty.

    Axis 0 of the grid: row tile and column block. Axis 1: episodes.
    elements: the number of mask elements over which the penalty is a mean.
    counters: for each episode one of its finished tiles, or of its finished images for the linf penalty; then one of
        each tile's finished blocks of columns, and one of each image's finished tiles.
    """
    episode, n, block, tile = program_tile(images, classes, D, BLOCK_M, BLOCK_N)
    start, row, valid, rows, _classes, first_image = tile
    batch_row = first_image * classes + row
    if weight is None:
        m = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    else:
        if bias is not None:
            bias += episode * bias_stride
        m = one_plus_offset(
            attended, weight + episode * weight_stride, bias, tile, n, D, BLOCK_M, BLOCK_N, BLOCK_C, COMPUTE, PRECISION
        )
    stopped = m <= 0.0
    if RELU:
        # tl.maximum would turn NaN into 0.
        m = tl.where(stopped, 0.0, m)
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
    offsets = batch_row[:, None] * D + n[None, :]
    if mask is not None:
        tl.store(mask + offsets, m.to(mask.dtype.element_ty), mask=valid[:, None])
    if distances is not None:
        if RELU:
            distance = tl.where(stopped, STOPPED, distance)
        tl.store(distances + offsets, distance.to(distances.dtype.element_ty), mask=valid[:, None])
    blocks: tl.constexpr = D // BLOCK_N
    tiles = tl.num_programs(0) // blocks
    counters += episode * (1 + tiles + images)
    if is_last_to_finish(counters + 1 + start // BLOCK_M, blocks):
        scale = tl.load(logit_scale).to(tl.float32)
        store_logits(logit_parts, logits, sums, scale, batch_row, valid, total_rows, D // CHUNK, 16, BLOCK_M)
        if PENALTY == 3:
            store_row_peaks(
                peak_values, peak_columns, row_values, row_columns, batch_row, valid, total_rows,
                D // PEAK_CHUNK, 8, BLOCK_M,
            )  # fmt: skip
            for image_of_episode in range(start // classes, (tl.minimum(start + BLOCK_M, rows) - 1) // classes + 1):
                first_tile = image_of_episode * classes // BLOCK_M
                end_tile = ((image_of_episode + 1) * classes - 1) // BLOCK_M + 1
                if is_last_to_finish(counters + 1 + tiles + image_of_episode, end_tile - first_tile):
                    b = first_image + image_of_episode
                    store_image_peak(row_values, row_columns, image_values, peaks, b, classes, D, 512)
                    if is_last_to_finish(counters, images):
                        store_penalty(image_values, penalty + episode, first_image, images, images, 512)
        elif PENALTY > 0:
            if is_last_to_finish(counters, tiles):
                programs = tl.num_programs(0)
                store_penalty(penalty_parts, penalty + episode, episode * programs, programs, elements, 512)


@dataclass
class MaskedLogits:
    """Hold the results of the forward pass, None for a result that was not asked for.

    logits: (B, K), penalty: (E,) and mask: (B, K, D), in the features' dtype.
    sums: (B, K) float32, logits / s.
    peaks: (B,) int64, k D + c of the first element [k, c] where |M - 1| of an image is largest.
    distances: (B, K, D), M - 1 in the type of the products, and -2 where relu has set M to zero.
    """

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None
    sums: Tensor
    peaks: Tensor | None
    distances: Tensor | None


def counters_needed(batch: int, classes: int, episodes: int) -> int:
    """Return how many counters a launch needs at most (see the kernel)."""
    images = batch // episodes
    return episodes * (1 + cdiv(images * classes, MIN_ROWS) + images)


class _ForwardLaunch(NamedTuple):
    """Hold the launch, and its number of parts of an episode's penalty."""

    launch: Launch
    parts: int


@remembered
def _forward_launch(
    batch: int,
    classes: int,
    width: int,
    relu: bool,
    penalty: int,
    episodes: int,
    weight_stride: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> _ForwardLaunch:
    """Return the launch. penalty: a value of PENALTIES.

    weights: the type in which the weights lie in memory.
    """
    images, rows = batch // episodes, batch // episodes * classes
    tile = tile or tile_of(dtype, rows, width, weights=weights, target=target)
    parts = (width // tile.columns) * cdiv(rows, tile.rows)
    launch = masked_logits_forward_kernel.launch(
        episode_grid(parts, episodes=episodes),
        images=images, classes=classes, total_rows=batch * classes, weight_stride=weight_stride,
        bias_stride=width if weight_stride else 0, elements=float(rows * width),
        D=width, TWO_IMAGES=classes >= tile.rows, RELU=relu, PENALTY=penalty, CHUNK=CHUNK, PEAK_CHUNK=PEAK_CHUNK,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth,
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision, target),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _ForwardLaunch(launch, parts)


def masked_logits_forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool,
    penalty: str = "none",
    return_mask: bool = False,
    keep: bool = False,
    episodes: int = 1,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> MaskedLogits:
    """Compute logits, the penalty of each episode and, if asked for, the mask, in one launch.

    image: (B, D).
    text: (K, D).
    attended: O, (B, K, D), the result of class_attention_forward.
    weight: Wo, (D, D) or (E, D, D); None if Wo and bo are zero, and so every mask is 1.
    bias: bo, (D,), (E, D) or None.
    keep: whether to store the distances, which the backward pass needs unless every mask is 1.
    counters: (counters_needed(B, K, E),) int32, zero; None lets PyTorch set some to zero, which is a launch of its own.

    The other arguments are those of rational_projections_forward.
    """
    (batch, width), classes = image.shape, text.shape[0]
    dtype = dtype or text.dtype
    kind = PENALTIES[penalty]
    float32 = {"dtype": torch.float32, "device": image.device}
    outputs = MaskedLogits(
        logits=image.new_empty((batch, classes)),
        # The mean over no images is zero.
        penalty=(image.new_empty if batch else image.new_zeros)((episodes,)) if kind else None,
        mask=image.new_empty((batch, classes, width)) if return_mask else None,
        sums=torch.empty((batch, classes), **float32),
        peaks=torch.empty((batch,), dtype=torch.int64, device=image.device) if kind == 3 else None,
        distances=image.new_empty((batch, classes, width), dtype=dtype) if keep and weight is not None else None,
    )
    if batch == 0:
        return outputs
    prepared = _forward_launch(
        batch, classes, width, relu, kind, episodes, episode_stride(weight), dtype,
        dtype if weight is None else weight.dtype, precision, target_of(image.device), tile,
    )  # fmt: skip
    logit_parts = torch.empty((width // CHUNK, batch, classes), **float32)
    penalty_parts = torch.empty((episodes, prepared.parts), **float32) if kind in (1, 2) else None
    peak_values = torch.empty((width // PEAK_CHUNK, batch, classes), **float32) if kind == 3 else None
    peak_columns = torch.empty_like(peak_values, dtype=torch.int32) if peak_values is not None else None
    row_values = torch.empty((batch, classes), **float32) if kind == 3 else None
    row_columns = torch.empty_like(row_values, dtype=torch.int32) if row_values is not None else None
    image_values = torch.empty((batch,), **float32) if kind == 3 else None
    if counters is None:
        needed = counters_needed(batch, classes, episodes)
        counters = torch.zeros((needed,), dtype=torch.int32, device=image.device)
    prepared.launch(
        image=image, text=text, attended=attended, weight=weight, bias=bias, logit_scale=logit_scale,
        logit_parts=logit_parts, penalty_parts=penalty_parts, peak_values=peak_values, peak_columns=peak_columns,
        row_values=row_values, row_columns=row_columns, image_values=image_values,
        logits=outputs.logits, sums=outputs.sums, penalty=outputs.penalty, peaks=outputs.peaks, mask=outputs.mask,
        distances=outputs.distances, counters=counters,
    )  # fmt: skip
    return outputs
