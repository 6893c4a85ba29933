"""Project the rational matrix, which is computed where it is used (RAda, arXiv:2507.15480, Eq. 2 and 6).

    qr, kk, vv [b, k] = scale R[b, k] W^T + bias,   R[b, k] = f[b] * T[k]
    qt[k] = sqrt(scale) T[k] W^T + bias,   qi[b] = sqrt(scale) f[b] W^T + bias

qr, qt and qi are the rational, text and image queries, kk the keys and vv the values; each has a weight W and a bias of
its own. One launch computes all five. A program owns a tile of rows and a block of columns of one of them, and R is
never written to memory. Weights may differ from episode to episode; all rows of a tile belong to one episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import cdiv, default_precision, episode_grid, input_scale, product, rational_rows
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.projection_tiles import Tile, tile_of


@triton.jit
def _project(
    out,
    features,
    weight,
    bias,
    first_row,
    first_image,
    start,
    rows,
    classes,
    first_column,
    scale,
    USE_IMAGE: tl.constexpr,
    USE_TEXT: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store one tile of scale X W^T + bias, where X is R, f or T.

    features: (image, text).
    first_row: the episode's first row in the output.
    start: the tile's first row in the episode.
    """
    image, text = features
    row = start + tl.arange(0, BLOCK_M)
    valid = row < rows
    n = first_column + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        if USE_IMAGE and USE_TEXT:
            tile = (start, row, valid, rows, classes, first_image)
            x = rational_rows(features, tile, columns, D, BLOCK_M, TWO_IMAGES)
        elif USE_IMAGE:
            x = tl.load(image + (first_image + row)[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
        else:
            x = tl.load(text + row[:, None] * D + columns[None, :], mask=valid[:, None], other=0.0)
        w = tl.load(weight + n[None, :] * D + columns[:, None])
        accumulator = product(x.to(COMPUTE), w.to(COMPUTE), accumulator, PRECISION)
    accumulator *= scale
    if bias is not None:
        accumulator += tl.load(bias + n).to(tl.float32)[None, :]
    out_row = (first_row + row).to(tl.int64)
    tl.store(out + out_row[:, None] * D + n[None, :], accumulator.to(out.dtype.element_ty), mask=valid[:, None])


@Kernel
def rational_projections_forward_kernel(
    image,
    text,
    logit_scale,
    image_weight,
    image_bias,
    text_weight,
    text_bias,
    rational_weight,
    rational_bias,
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    q_image,
    q_text,
    q_rational,
    keys,
    values,
    counters,
    images,
    classes,
    num_counters,
    weight_stride,
    bias_stride,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    SHARED: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of one of the projections. The first program also sets the counters to zero.

    Axis 0 of the grid: tiles of the outputs (B, K, D), then of the text query, then of the image query. Axis 1:
    episodes.
    """
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    compute: tl.constexpr = keys.dtype.element_ty
    features = (image, text)
    rows = images * classes
    blocks: tl.constexpr = D // BLOCK_N
    outputs: tl.constexpr = 2 if q_rational is None else 3
    row_programs = tl.cdiv(rows, BLOCK_M) * (outputs * blocks)
    text_programs = tl.cdiv(classes, BLOCK_M) * blocks
    if q_text is None:
        text_programs = 0
    elif SHARED:
        # One text query serves all episodes: the programs of the first episode compute it.
        text_programs = tl.where(episode == 0, text_programs, 0)
    if counters is not None:
        for first in range(0, tl.where(program + episode == 0, num_counters, 0), 1024):
            counter = first + tl.arange(0, 1024)
            tl.store(counters + counter, tl.zeros((1024,), tl.int32), mask=counter < num_counters)
    scale = input_scale(logit_scale, FACTOR)
    weight_offset, bias_offset = episode * weight_stride, episode * bias_stride
    first_image = episode * images
    if program < row_programs:
        # Neighbouring programs share rows of R in the L2 cache, and all programs share the weights.
        tile, block = program // (outputs * blocks), program % (outputs * blocks)
        output, first_column = block // blocks, (block % blocks) * BLOCK_N
        weight, bias, out = key_weight, key_bias, keys
        if output == 1:
            weight, bias, out = value_weight, value_bias, values
        if q_rational is not None:
            if output == 2:
                weight, bias, out = rational_weight, rational_bias, q_rational
        if key_bias is not None:
            bias += bias_offset
        _project(
            out, features, weight + weight_offset, bias, first_image * classes, first_image, tile * BLOCK_M, rows,
            classes, first_column, scale, True, True, TWO_IMAGES, D, BLOCK_M, BLOCK_N, BLOCK_C, compute, PRECISION,
        )  # fmt: skip
    elif program < row_programs + text_programs:
        if q_text is not None:
            program -= row_programs
            bias = text_bias
            if key_bias is not None:
                bias += bias_offset
            _project(
                q_text, features, text_weight + weight_offset, bias, episode * classes, first_image,
                program // blocks * BLOCK_M, classes, classes, (program % blocks) * BLOCK_N, tl.sqrt(scale),
                False, True, TWO_IMAGES, D, BLOCK_M, BLOCK_N, BLOCK_C, compute, PRECISION,
            )  # fmt: skip
    elif q_image is not None:
        program -= row_programs + text_programs
        if program < tl.cdiv(images, BLOCK_I) * blocks:
            bias = image_bias
            if key_bias is not None:
                bias += bias_offset
            _project(
                q_image, features, image_weight + weight_offset, bias, first_image, first_image,
                program // blocks * BLOCK_I, images, 1, (program % blocks) * BLOCK_N, tl.sqrt(scale),
                True, False, False, D, BLOCK_I, BLOCK_N, BLOCK_C, compute, PRECISION,
            )  # fmt: skip


@dataclass
class ProjectionBuffers:
    """Hold the results of the projections, or their gradients; None where a query kind is not in use.

    keys, values, q_rational: (B, K, D). q_text: (1 or E, K, D), its gradient (B, K, D). q_image: (B, D) float32.
    """

    keys: Tensor | None
    values: Tensor | None
    q_rational: Tensor | None
    q_text: Tensor | None
    q_image: Tensor | None


@remembered
def _forward_launch(
    batch: int,
    classes: int,
    width: int,
    kinds: tuple[str, ...],
    scale_factor: float,
    episodes: int,
    shared: bool,
    dtype: torch.dtype,
    stored: tuple[torch.dtype, torch.dtype],
    precision: str,
    num_counters: int,
    target: Target,
    tile: Tile | None,
) -> Launch:
    """Return the launch of all projections.

    kinds: the keys of the weights. shared: whether episodes share them.
    stored: the types in which the features and the weights lie in memory.
    """
    images = batch // episodes
    features, weights = stored
    tile = tile or tile_of(
        dtype, images * classes, classes, width, precision, features=features, weights=weights, target=target
    )
    programs = (width // tile.columns) * (
        cdiv(images * classes, tile.rows) * (2 + ("rational" in kinds))
        + cdiv(classes, tile.rows) * ("text" in kinds)
        + cdiv(images, tile.image_rows) * ("image" in kinds)
    )
    return rational_projections_forward_kernel.launch(
        episode_grid(programs, episodes=episodes),
        images=images, classes=classes, num_counters=num_counters,
        weight_stride=0 if shared else width * width, bias_stride=0 if shared else width,
        D=width, FACTOR=scale_factor, SHARED=shared, TWO_IMAGES=classes >= tile.rows, BLOCK_M=tile.rows,
        BLOCK_N=tile.columns, BLOCK_C=tile.depth, BLOCK_I=tile.image_rows,
        PRECISION=default_precision(dtype, precision, target), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def rational_projections_forward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    *,
    scale_factor: float,
    episodes: int = 1,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> ProjectionBuffers:
    """Compute every projection that the attention needs, in one launch.

    image: (B, D). text: (K, D), same dtype, contiguous.
    logit_scale: s itself, () float32 on the device.
    weights, biases: (D, D) and (D,), or with a leading axis of episodes, under the keys "image", "text", "rational"
        (those in use), "key" and "value". biases may be empty.
    dtype: the type of the products and of their results; None takes text's.
    scale_factor: the inputs' scale is this times s; 0 leaves the inputs unscaled.
    episodes: E; image b belongs to episode b // (B/E).
    counters: int32, set to zero for the launches that follow (see _common.is_last_to_finish).
    """
    (batch, width), classes = image.shape, text.shape[0]
    dtype = dtype or text.dtype
    shared = weights["key"].ndim == 2
    empty = partial(text.new_empty, dtype=dtype)
    projections = ProjectionBuffers(
        keys=empty((batch, classes, width)),
        values=empty((batch, classes, width)),
        q_rational=empty((batch, classes, width)) if "rational" in weights else None,
        q_text=empty((1 if shared else episodes, classes, width)) if "text" in weights else None,
        q_image=empty((batch, width), dtype=torch.float32) if "image" in weights else None,
    )
    if batch == 0:
        return projections
    launch = _forward_launch(
        batch, classes, width, tuple(weights), scale_factor, episodes, shared, dtype,
        (text.dtype, weights["key"].dtype), precision, 0 if counters is None else len(counters),
        target_of(text.device), tile,
    )  # fmt: skip
    launch(
        image=image, text=text, logit_scale=logit_scale,
        image_weight=weights.get("image"), image_bias=biases.get("image"),
        text_weight=weights.get("text"), text_bias=biases.get("text"),
        rational_weight=weights.get("rational"), rational_bias=biases.get("rational"), key_weight=weights["key"],
        key_bias=biases.get("key"), value_weight=weights["value"], value_bias=biases.get("value"),
        q_image=projections.q_image, q_text=projections.q_text, q_rational=projections.q_rational,
        keys=projections.keys, values=projections.values, counters=counters,
    )  # fmt: skip
    return projections
