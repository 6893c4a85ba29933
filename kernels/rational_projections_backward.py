"""Compute the gradients of the image and text features through their projections, in two launches.

    dR = scale (dqr Wr + dkk Wk + dvv Wv) + weighted,   df[b] = sum_k dR[b, k] * T[k] + sqrt(scale) dqi[b] Wi
    dT[k] = sum_b dR[b, k] * f[b] + sqrt(scale) sum_b dqt[b, k] Wt

Wr, Wk, Wv, Wt and Wi are the weights of the rational query, the keys, the values, the text and the image query.

A program of the first launch owns a tile of classes and a block of columns, and goes through a group of images. Its dR
stays in registers. It stores what its classes add to df of each image, and what its images add to dT. The second launch
adds these parts up, always in the same order. With so many classes that all images make one group, the first launch
stores dT itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import cdiv, default_precision, episode_grid, episode_stride, input_scale, product
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.projection_tiles import backward_tile_of
from rada_fast.kernels.rational_projections import ProjectionBuffers

PROGRAMS = 528
"""The most programs among which images are divided into groups: four for each of an H100's 132 processors.

The number is the same for every device, because it decides in which order numbers are added up.
"""
PARTS_AT_ONCE = tl.constexpr(4)
"""The number of parts that are loaded together before they are added up."""


@Kernel
def rational_projections_backward_kernel(
    image,
    text,
    logit_scale,
    text_weight,
    rational_weight,
    key_weight,
    value_weight,
    dq_text,
    dq_rational,
    dkeys,
    dvalues,
    weighted,
    dtext,
    image_parts,
    batch,
    images,
    classes,
    group_images,
    weight_stride,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute what a group of images adds to dT of a tile of classes and a block of columns, and these classes to df.

    feature_gradients_reduce_kernel adds up these parts. dtext: dT's, (groups, K, D) in float32, or dT, (K, D), if all
    images make one group. image_parts: those of df, one for every sixteen classes. Axes of the grid: tiles of classes,
    blocks of columns, groups.
    """
    tile, first_column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = k < classes
    n = first_column + tl.arange(0, BLOCK_N)
    t = tl.load(text + k[:, None] * D + n[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    scale = input_scale(logit_scale, FACTOR)
    compute = dkeys.dtype.element_ty
    from_text_query = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtext_tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stride = tl.full((), classes, tl.int64)
    group = tl.program_id(2)
    for b in range(group * group_images, tl.minimum((group + 1) * group_images, batch)):
        row_offsets = (b * stride + k)[:, None] * D
        weight_offset = (b // images).to(tl.int64) * weight_stride
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, D, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            offsets = row_offsets + columns[None, :]
            weight_offsets = weight_offset + columns[:, None] * D + n[None, :]
            x = tl.load(dkeys + offsets, mask=valid[:, None], other=0.0)
            w = tl.load(key_weight + weight_offsets).to(compute)
            accumulator = product(x, w, accumulator, PRECISION)
            x = tl.load(dvalues + offsets, mask=valid[:, None], other=0.0)
            w = tl.load(value_weight + weight_offsets).to(compute)
            accumulator = product(x, w, accumulator, PRECISION)
            if rational_weight is not None:
                x = tl.load(dq_rational + offsets, mask=valid[:, None], other=0.0)
                w = tl.load(rational_weight + weight_offsets).to(compute)
                accumulator = product(x, w, accumulator, PRECISION)
            if text_weight is not None:
                x = tl.load(dq_text + offsets, mask=valid[:, None], other=0.0)
                w = tl.load(text_weight + weight_offsets).to(compute)
                from_text_query = product(x, w, from_text_query, PRECISION)
        from_mask = tl.load(weighted + row_offsets + n[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        drational = accumulator * scale + from_mask
        f = tl.load(image + b * D + n).to(tl.float32)
        dtext_tile += drational * f[None, :]
        # Sixteen classes lie in one warp, so their sum does not go through shared memory.
        strips: tl.constexpr = BLOCK_M // 16
        part = ((tile * strips + tl.arange(0, strips)) * batch + b).to(tl.int64)
        sums = tl.sum(tl.reshape(drational * t, (strips, 16, BLOCK_N)), 1)
        lines = tl.broadcast_to(sums[:, None, :], (strips, 16, BLOCK_N))
        part_offsets = tl.broadcast_to(part[:, None, None] * D + n[None, None, :], (strips, 16, BLOCK_N))
        tl.store(image_parts + part_offsets, lines, mask=(tl.arange(0, 16) == 0)[None, :, None])
    dtext_tile += from_text_query * tl.sqrt(scale)
    dtext += group * stride * D
    tl.store(dtext + k[:, None] * D + n[None, :], dtext_tile.to(dtext.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _add_parts(total, values, offsets, stride, parts, valid):
    """Add values[part * stride + offsets] to a tile, for every part in order. The loads of several are under way
    together."""
    for first in range(0, parts, PARTS_AT_ONCE):
        for j in tl.static_range(PARTS_AT_ONCE):
            part = first + j
            part_values = values + tl.cast(part, tl.int64) * stride
            total += tl.load(part_values + offsets, mask=valid[:, None] & (part < parts), other=0.0)
    return total


@Kernel
def feature_gradients_reduce_kernel(
    logit_scale,
    image_weight,
    dq_image,
    image_parts,
    text_parts,
    dimage,
    dtext,
    batch,
    images,
    classes,
    parts,
    groups,
    weight_stride,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute a tile of df, the sum of its parts and of the gradient through the image query, or a tile of dT, the sum
    of its parts. text_parts is None where there are none.

    Axis 0 of the grid: tiles of an episode's images, then the episode's share of the tiles of classes. Axis 1: blocks
    of columns. Axis 2: episodes.
    """
    episode = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if text_parts is not None:
        image_tiles = tl.cdiv(images, BLOCK_M)
        if tl.program_id(0) >= image_tiles:
            tile = (tl.program_id(0) - image_tiles) * tl.num_programs(2) + tl.program_id(2)
            k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            text_offsets = k[:, None] * D + n[None, :]
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total = _add_parts(total, text_parts, text_offsets, tl.cast(classes, tl.int64) * D, groups, k < classes)
            tl.store(dtext + text_offsets, total.to(dtext.dtype.element_ty), mask=(k < classes)[:, None])
            return
    episode_image = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = episode_image < images
    b = episode * images + episode_image
    row_offsets = b[:, None] * D
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if image_weight is not None:
        for c in range(0, D, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            x = tl.load(dq_image + row_offsets + columns[None, :], mask=valid[:, None], other=0.0)
            w = tl.load(image_weight + episode * weight_stride + columns[:, None] * D + n[None, :]).to(tl.float32)
            accumulator = product(x, w, accumulator, "ieee")
        accumulator *= tl.sqrt(input_scale(logit_scale, FACTOR))
    image_offsets = row_offsets + n[None, :]
    accumulator = _add_parts(accumulator, image_parts, image_offsets, tl.cast(batch, tl.int64) * D, parts, valid)
    tl.store(dimage + image_offsets, accumulator.to(dimage.dtype.element_ty), mask=valid[:, None])


class _BackwardLaunches(NamedTuple):
    """Hold both launches, and the numbers of parts of df and of dT that the first one stores for the second one.

    groups: 0 where the first launch stores dT itself.
    """

    both: Launch
    reduce: Launch
    parts: int
    groups: int


def images_of_a_group(batch: int, programs: int) -> int:
    """Return how many images a program goes through, where each group of images takes `programs` programs."""
    return cdiv(batch, min(batch, max(1, PROGRAMS // programs)))


@remembered
def _backward_launches(
    batch: int,
    classes: int,
    width: int,
    scale_factor: float,
    episodes: int,
    weight_stride: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    precision: str,
    target: Target,
) -> _BackwardLaunches:
    """Return the launches. weights: the type in which the weights lie in memory."""
    images, tile = batch // episodes, backward_tile_of(dtype, width, precision, weights=weights, target=target)
    tiles = cdiv(classes, tile.rows)
    parts = tiles * (tile.rows // 16)
    blocks = width // tile.columns
    group_images = images_of_a_group(batch, tiles * blocks)
    # Classes alone decide whether dT has parts, so that a last batch of a single image compiles no kernel anew.
    groups = cdiv(batch, group_images) if tiles * blocks <= PROGRAMS // 2 else 0
    both = rational_projections_backward_kernel.launch(
        (tiles, blocks, max(1, groups)),
        batch=batch, images=images, classes=classes, group_images=group_images, weight_stride=weight_stride,
        D=width, FACTOR=scale_factor, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth,
        PRECISION=default_precision(dtype, precision, target), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    # The episodes share the tiles of dT, which has no axis of episodes.
    text_tiles = cdiv(cdiv(classes, tile.image_rows), episodes) if groups else 0
    reduce = feature_gradients_reduce_kernel.launch(
        episode_grid(cdiv(images, tile.image_rows) + text_tiles, blocks, episodes=episodes),
        batch=batch, images=images, classes=classes, parts=parts, groups=groups, weight_stride=weight_stride,
        D=width, FACTOR=scale_factor, BLOCK_M=tile.image_rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return _BackwardLaunches(both, reduce, parts, groups)


def rational_projections_backward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    weights: dict[str, Tensor],
    gradients: ProjectionBuffers,
    weighted: Tensor,
    *,
    scale_factor: float,
    episodes: int = 1,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Compute df, (B, D), and dT, (K, D), in two launches, with the weights of each image's episode.

    gradients: the projections' gradients; q_text has one for each image, (B, K, D).
    weighted: s dlogits M, (B, K, D).
    """
    (batch, width), classes = image.shape, text.shape[0]
    dimage, dtext = torch.empty_like(image), torch.empty_like(text)
    if batch == 0:
        return dimage, dtext.zero_()
    launches = _backward_launches(
        batch, classes, width, scale_factor, episodes, episode_stride(weights["key"]), weighted.dtype,
        weights["key"].dtype, precision, target_of(text.device),
    )  # fmt: skip
    image_parts = image.new_empty((launches.parts, batch, width), dtype=torch.float32)
    text_parts = None
    if launches.groups:
        text_parts = text.new_empty((launches.groups, classes, width), dtype=torch.float32)
    launches.both(
        image=image, text=text, logit_scale=logit_scale,
        text_weight=weights.get("text"), rational_weight=weights.get("rational"),
        key_weight=weights["key"], value_weight=weights["value"],
        dq_text=gradients.q_text, dq_rational=gradients.q_rational, dkeys=gradients.keys, dvalues=gradients.values,
        weighted=weighted, dtext=dtext if text_parts is None else text_parts, image_parts=image_parts,
    )  # fmt: skip
    launches.reduce(
        logit_scale=logit_scale, image_weight=weights.get("image"), dq_image=gradients.q_image,
        image_parts=image_parts, text_parts=text_parts, dimage=dimage, dtext=None if text_parts is None else dtext,
    )  # fmt: skip
    return dimage, dtext
