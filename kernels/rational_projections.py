"""Projections of the rational matrix, which is formed in the prologue (RAda, arXiv:2507.15480, Eq. 2 and 6).

    qr, kk, vv [b, k] = scale R[b, k] W^T + bias,   R[b, k] = f[b] * T[k]
    qt[k] = sqrt(scale) T[k] W^T + bias,   qi[b] = sqrt(scale) f[b] W^T + bias

One launch makes all five. A program owns a tile of rows and a block of columns of one of them; R never reaches memory.
Weights may differ from episode to episode: a tile's rows belong to one episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    block_of,
    cdiv,
    default_precision,
    episode_stride,
    input_scale,
    product,
    rational_rows,
)


@dataclass(frozen=True)
class Tile:
    """Rows, columns and reduction of one product's tile; rows of the image query's; warps; pipeline stages."""

    rows: int
    columns: int
    depth: int
    image_rows: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, rows: int, width: int, precision: str = "ieee") -> Tile:
    """The table. rows: of one episode, n K."""
    if dtype == torch.float32:
        # As in class_attention: short reductions, one stage. Without tensor cores higher tiles read less of W.
        return Tile(128 if precision == "ieee" and rows > 512 else 64, block_of(width, 64), 16, 16, 4, 1)
    if rows <= 512:
        # Few rows: smaller tiles fill more of the processors and waste less in the tail.
        return Tile(64, block_of(width, 64), block_of(width, 64), 16, 4, 3)
    # 128 x 128 is the least tile at which an A100's L2 keeps up with its tensor cores; eight warps hold it in 64
    # registers each, three stages of 64 columns fill 96 KB.
    columns = block_of(width, 128)
    # 16 x 32 is four tensor cores' tiles: with eight warps two would make each.
    return Tile(128, columns, block_of(width, 64), 32 if columns == 32 else 16, 8, 3)


@triton.jit
def _project(
    out, image, text, weight, bias, first_row, first_image, first, rows, classes, column, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TWO: tl.constexpr,
    USE_IMAGE: tl.constexpr, USE_TEXT: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scale X W^T + bias. first_row: the episode's in the output; first: the tile's in the episode."""
    row = first + tl.arange(0, BLOCK_M)
    ok = row < rows
    n = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, D, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        if USE_IMAGE and USE_TEXT:
            x = rational_rows(image, text, first_image, first, row, ok, rows, classes, columns, D, BLOCK_M, TWO)
        elif USE_IMAGE:
            x = tl.load(image + (first_image + row)[:, None] * D + columns[None, :], mask=ok[:, None], other=0.0)
        else:
            x = tl.load(text + row[:, None] * D + columns[None, :], mask=ok[:, None], other=0.0)
        w = tl.load(weight + n[None, :] * D + columns[:, None])
        acc = product(x.to(COMPUTE), w.to(COMPUTE), acc, PRECISION)
    acc *= scale
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    at = (first_row + row).to(tl.int64)
    tl.store(out + at[:, None] * D + n[None, :], acc.to(out.dtype.element_ty), mask=ok[:, None])


@triton.jit
def rational_projections_forward_kernel(
    image, text, logit_scale,
    w_image, b_image, w_text, b_text, w_rational, b_rational, w_key, b_key, w_value, b_value,
    q_image, q_text, q_rational, keys, values,
    episode_images, classes, w_stride, b_stride,
    D: tl.constexpr, FACTOR: tl.constexpr, IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr,
    SHARED: tl.constexpr, BIAS: tl.constexpr, TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Axis 0: tiles of the wide outputs, then of the text query, then of the image query. Axis 1: episodes."""
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    compute: tl.constexpr = keys.dtype.element_ty
    rows = episode_images * classes
    columns: tl.constexpr = D // BLOCK_N
    wide: tl.constexpr = 3 if RATIONAL else 2
    wide_programs = tl.cdiv(rows, BLOCK_M) * (wide * columns)
    text_programs = tl.cdiv(classes, BLOCK_M) * columns
    if not TEXT:
        text_programs = 0
    elif SHARED:
        # One text query serves all episodes: the first one's programs make it.
        text_programs = tl.where(episode == 0, text_programs, 0)
    scale = input_scale(logit_scale, FACTOR)
    weight_at, bias_at = episode * w_stride, episode * b_stride
    first_image = episode * episode_images
    if program < wide_programs:
        # Neighbours share rows of R, in the L2 cache, and the weights, all of them.
        tile, column = program // (wide * columns), program % (wide * columns)
        which, column = column // columns, (column % columns) * BLOCK_N
        weight, bias, out = w_key, b_key, keys
        if which == 1:
            weight, bias, out = w_value, b_value, values
        if RATIONAL:
            if which == 2:
                weight, bias, out = w_rational, b_rational, q_rational
        if BIAS:
            bias += bias_at
        _project(
            out, image, text, weight + weight_at, bias, first_image * classes, first_image, tile * BLOCK_M,
            rows, classes, column, scale, D, BLOCK_M, BLOCK_N, BLOCK_C, TWO, True, True, BIAS, compute, PRECISION,
        )  # fmt: skip
    elif program < wide_programs + text_programs:
        if TEXT:
            program -= wide_programs
            bias = b_text
            if BIAS:
                bias += bias_at
            _project(
                q_text, image, text, w_text + weight_at, bias, episode * classes, first_image,
                program // columns * BLOCK_M, classes, classes, (program % columns) * BLOCK_N, tl.sqrt(scale),
                D, BLOCK_M, BLOCK_N, BLOCK_C, TWO, False, True, BIAS, compute, PRECISION,
            )  # fmt: skip
    elif IMAGE:
        program -= wide_programs + text_programs
        if program < tl.cdiv(episode_images, BLOCK_I) * columns:
            bias = b_image
            if BIAS:
                bias += bias_at
            _project(
                q_image, image, text, w_image + weight_at, bias, first_image, first_image,
                program // columns * BLOCK_I, episode_images, 1, (program % columns) * BLOCK_N, tl.sqrt(scale),
                D, BLOCK_I, BLOCK_N, BLOCK_C, False, True, False, BIAS, compute, PRECISION,
            )  # fmt: skip


@dataclass
class ProjectionBuffers:
    """keys, values, q_rational: (B, K, D); q_text: (1 or E, K, D); q_image: (B, D) float32. None where not in use."""

    keys: Tensor | None
    values: Tensor | None
    q_rational: Tensor | None
    q_text: Tensor | None
    q_image: Tensor | None


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
    precision: str = "ieee",
    tile: Tile | None = None,
) -> ProjectionBuffers:
    """Every projection the attention needs, in one launch.

    image: (B, D); text: (K, D), same dtype, contiguous; logit_scale: () float32 on the device, s itself.
    weights, biases: by "image", "text", "rational" (those in use), "key" and "value"; (D, D) and (D,), or with a
        leading axis of episodes. biases may be empty.
    dtype: of the products and of what they make; None for text's.
    scale_factor: multiplies s inside the scaled inputs; 0 for none. episodes: E; image b belongs to episode b // (B/E).
    """
    (batch, width), classes = image.shape, text.shape[0]
    images = batch // episodes
    dtype = dtype or text.dtype
    tile = tile or tile_of(dtype, images * classes, width, precision)
    empty = partial(text.new_empty, dtype=dtype)
    key = weights["key"]
    shared = key.ndim == 2
    made = ProjectionBuffers(
        empty((batch, classes, width)),
        empty((batch, classes, width)),
        empty((batch, classes, width)) if "rational" in weights else None,
        empty((1 if shared else episodes, classes, width)) if "text" in weights else None,
        empty((batch, width), dtype=torch.float32) if "image" in weights else None,
    )
    columns = width // tile.columns
    programs = columns * (
        cdiv(images * classes, tile.rows) * (2 + ("rational" in weights))
        + cdiv(classes, tile.rows) * ("text" in weights)
        + cdiv(images, tile.image_rows) * ("image" in weights)
    )
    if batch == 0:
        return made
    rational_projections_forward_kernel[(programs, episodes)](
        image, text, logit_scale,
        weights.get("image"), biases.get("image"), weights.get("text"), biases.get("text"),
        weights.get("rational"), biases.get("rational"), key, biases.get("key"), weights["value"], biases.get("value"),
        made.q_image, made.q_text, made.q_rational, made.keys, made.values,
        images, classes, episode_stride(key), biases["key"].stride(0) if biases and not shared else 0,
        D=width, FACTOR=scale_factor,
        IMAGE="image" in weights, TEXT="text" in weights, RATIONAL="rational" in weights,
        SHARED=shared, BIAS=bool(biases), TWO=classes >= tile.rows,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_C=tile.depth, BLOCK_I=tile.image_rows,
        PRECISION=default_precision(dtype, precision), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made


@triton.jit
def rational_projections_backward_kernel(
    image, text, logit_scale, w_text, w_rational, w_key, w_value,
    dq_text, dq_rational, dkeys, dvalues, weighted, dtext, image_parts,
    batch, images, classes, w_stride,
    D: tl.constexpr, FACTOR: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns classes and columns and goes through the images: dT stays in registers, df leaves as a part."""
    tile, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = k < classes
    n = column + tl.arange(0, BLOCK_N)
    t = tl.load(text + k[:, None] * D + n[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    scale = input_scale(logit_scale, FACTOR)
    compute = dkeys.dtype.element_ty
    from_query = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stride = tl.full((), classes, tl.int64)
    for b in range(batch):
        at = (b * stride + k)[:, None] * D
        own = (b // images).to(tl.int64) * w_stride
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, D, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            there = at + columns[None, :]
            weight = own + columns[:, None] * D + n[None, :]
            x = tl.load(dkeys + there, mask=ok[:, None], other=0.0)
            acc = product(x, tl.load(w_key + weight).to(compute), acc, PRECISION)
            x = tl.load(dvalues + there, mask=ok[:, None], other=0.0)
            acc = product(x, tl.load(w_value + weight).to(compute), acc, PRECISION)
            if RATIONAL:
                x = tl.load(dq_rational + there, mask=ok[:, None], other=0.0)
                acc = product(x, tl.load(w_rational + weight).to(compute), acc, PRECISION)
            if TEXT:
                x = tl.load(dq_text + there, mask=ok[:, None], other=0.0)
                w = tl.load(w_text + weight).to(compute)
                from_query = product(x, w, from_query, PRECISION)
        rational = acc * scale + tl.load(weighted + at + n[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
        f = tl.load(image + b * D + n).to(tl.float32)
        gradient += rational * f[None, :]
        # Sixteen classes a part: they lie in one warp, so that nothing crosses shared memory.
        strips: tl.constexpr = BLOCK_M // 16
        part = ((tile * strips + tl.arange(0, strips)) * batch + b).to(tl.int64)
        sums = tl.sum(tl.reshape(rational * t, (strips, 16, BLOCK_N)), 1)
        spread = tl.broadcast_to(sums[:, None, :], (strips, 16, BLOCK_N))
        there = tl.broadcast_to(part[:, None, None] * D + n[None, None, :], (strips, 16, BLOCK_N))
        tl.store(image_parts + there, spread, mask=(tl.arange(0, 16) == 0)[None, :, None])
    gradient += from_query * tl.sqrt(scale)
    tl.store(dtext + k[:, None] * D + n[None, :], gradient.to(dtext.dtype.element_ty), mask=ok[:, None])


@triton.jit
def image_gradient_reduce_kernel(
    image_parts, dq_image, w_image, logit_scale, dimage, batch, images, parts, w_stride,
    D: tl.constexpr, FACTOR: tl.constexpr, IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """df: the parts in their order, and what came through the image query. Axes: images, columns, episodes."""
    episode = tl.program_id(2).to(tl.int64)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = own < images
    b = episode * images + own
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = b[:, None] * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if IMAGE:
        for c in range(0, D, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            x = tl.load(dq_image + at + columns[None, :], mask=ok[:, None], other=0.0)
            w = tl.load(w_image + episode * w_stride + columns[:, None] * D + n[None, :]).to(tl.float32)
            acc = product(x, w, acc, "ieee")
        acc *= tl.sqrt(input_scale(logit_scale, FACTOR))
    for part in range(parts):
        there = (part * batch + b)[:, None] * D + n[None, :]
        acc += tl.load(image_parts + there, mask=ok[:, None], other=0.0)
    tl.store(dimage + at + n[None, :], acc.to(dimage.dtype.element_ty), mask=ok[:, None])


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
    """df (B, D) and dT (K, D), in two launches; weights are those of the image's episode.

        dR = scale (dqr Wr + dkk Wk + dvv Wv) + weighted,   df[b] = sum_k dR[b, k] * T[k] + sqrt(scale) dqi[b] Wi
        dT[k] = sum_b dR[b, k] * f[b] + sqrt(scale) sum_b dqt[b, k] Wt

    gradients: of the projections, q_text one for each image (B, K, D). weighted: s dlogits M, (B, K, D).
    """
    (batch, width), classes = image.shape, text.shape[0]
    images, stride = batch // episodes, episode_stride(weights["key"])
    # Two accumulators beside T: wider tiles spill.
    exact = gradients.keys.dtype == torch.float32
    without_tensor_cores = exact and precision == "ieee"
    block_m, block_n = 32 if without_tensor_cores else 64, block_of(width, 32)
    block_c = block_of(width, 16 if exact else 32)
    tiles = cdiv(classes, block_m)
    parts = tiles * (block_m // 16)
    image_parts = image.new_empty((parts, batch, width), dtype=torch.float32)
    dtext, dimage = torch.empty_like(text), torch.empty_like(image)
    if batch == 0:
        return dimage, dtext.zero_()
    rational_projections_backward_kernel[(tiles, width // block_n)](
        image, text, logit_scale, weights.get("text"), weights.get("rational"), weights["key"], weights["value"],
        gradients.q_text, gradients.q_rational, gradients.keys, gradients.values, weighted, dtext, image_parts,
        batch, images, classes, stride,
        D=width, FACTOR=scale_factor, TEXT="text" in weights, RATIONAL="rational" in weights,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c,
        PRECISION=default_precision(gradients.keys.dtype, precision), num_warps=8 if without_tensor_cores else 4,
        num_stages=2,
    )  # fmt: skip
    image_gradient_reduce_kernel[(cdiv(images, 16), width // block_n, episodes)](
        image_parts, gradients.q_image, weights.get("image"), logit_scale, dimage, batch, images,
        parts, stride,
        D=width, FACTOR=scale_factor, IMAGE="image" in weights,
        BLOCK_M=16, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dimage, dtext
