"""Gradients of all weights and biases in one launch.

    dW[o, c] = sum_rows dY[row, o] X[row, c],   dbias[o] = sum_rows dY[row, o]

X is scale R for keys, values and the rational query, sqrt(scale) T and sqrt(scale) f for the other queries, O for the
output projection; all are made in the prologue. A program owns one block of one weight (of one episode) and goes
through all its rows: no parts, nothing to add up afterwards, the same order every time.
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
    default_precision,
    input_scale,
    product,
    rational_rows,
    store_column_sums,
)
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.rational_projections import ProjectionBuffers

ROLES = ("key", "value", "rational", "output", "text", "image")
"""Longest first: the wide ones go through B K rows."""


@dataclass(frozen=True)
class Tile:
    """Outputs and inputs of a weight's block; rows of a step; warps; pipeline stages."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, width: int, precision: str = "ieee") -> Tile:
    """The table."""
    if dtype == torch.float32:
        # As in class_attention: short reductions. Products of TF32: one stage, a strip of 16 rows for each warp.
        block = block_of(width, 64)
        return Tile(block, block, 16, 4, 2) if precision == "ieee" else Tile(block, block, 16, block // 16, 1)
    # 128 x 64: at D 512 the four wide weights are 128 programs for 108 processors; 128 x 128 would be 64.
    return Tile(block_of(width, 128), block_of(width, 64), 64, 8, 3)


@triton.jit
def _block(
    image, text, attended_text, attended_rational, attended_image, factors, gradient, out_weight, out_bias,
    first_row, first_image, images, classes, total_rows, out_column, in_column, share, scale,
    SOURCE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr,
    IMAGE: tl.constexpr, MATRIX: tl.constexpr, TWO: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SOURCE: 0, X = R; 1, O; 2, T, with dY summed over the images; 3, f."""
    o = out_column + tl.arange(0, BLOCK_O)
    i = in_column + tl.arange(0, BLOCK_I)
    rows = images * classes
    if SOURCE == 2:
        rows = classes
    elif SOURCE == 3:
        rows = images
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        ok = row < rows
        if SOURCE == 0:
            x = rational_rows(image, text, first_image, start, row, ok, rows, classes, i, D, BLOCK_R, TWO)
        elif SOURCE == 1:
            x = attended_rows(
                attended_text, attended_rational, attended_image, factors, first_row, first_image, start, row, ok, rows,
                classes, total_rows, in_column, i, share, D, HEAD, BLOCK_R, BLOCK_I, TWO, TEXT, RATIONAL, IMAGE, MATRIX,
            )  # fmt: skip
        elif SOURCE == 2:
            x = tl.load(text + row[:, None] * D + i[None, :], mask=ok[:, None], other=0.0)
        else:
            x = tl.load(image + (first_image + row)[:, None] * D + i[None, :], mask=ok[:, None], other=0.0)
        if SOURCE == 2:
            dy = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
            for b in range(images):
                at = (first_row + b * classes + row)[:, None] * D + o[None, :]
                dy += tl.load(gradient + at, mask=ok[:, None], other=0.0).to(tl.float32)
        elif SOURCE == 3:
            dy = tl.load(gradient + (first_image + row)[:, None] * D + o[None, :], mask=ok[:, None], other=0.0)
        else:
            dy = tl.load(gradient + (first_row + row)[:, None] * D + o[None, :], mask=ok[:, None], other=0.0)
        acc = product(tl.trans(dy.to(COMPUTE)), x.to(COMPUTE), acc, PRECISION)
    there = o[:, None] * D + i[None, :]
    tl.store(out_weight + there, (acc * scale).to(out_weight.dtype.element_ty))
    if BIAS:
        if in_column == 0:
            # dY again, out of the cache, by one program in D / BLOCK_I.
            total = tl.zeros((BLOCK_O,), tl.float32)
            dy_rows = rows
            if SOURCE == 2:
                dy_rows = images * classes
            first = first_row
            if SOURCE == 3:
                first = first_image
            for start in range(0, dy_rows, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)
                at = (first + row)[:, None] * D + o[None, :]
                total += tl.sum(tl.load(gradient + at, mask=(row < dy_rows)[:, None], other=0.0).to(tl.float32), 0)
            store_column_sums(out_bias + o, total, o < D, BLOCK_R, BLOCK_O)


@triton.jit
def parameter_gradients_kernel(
    image, text, logit_scale, attended_text, attended_rational, attended_image, factors,
    dkeys, dvalues, dq_rational, doffset, dq_text, dq_image,
    key_weight, key_bias, value_weight, value_bias, rational_weight, rational_bias,
    output_weight, output_bias, text_weight, text_bias, image_weight, image_bias,
    images, classes, total_rows, share,
    KEY_ON: tl.constexpr, VALUE_ON: tl.constexpr, RATIONAL_ON: tl.constexpr, OUTPUT_ON: tl.constexpr,
    TEXT_ON: tl.constexpr, IMAGE_ON: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, IMAGE: tl.constexpr,
    MATRIX: tl.constexpr, FACTOR: tl.constexpr, TWO: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Axis 0: role among those asked for, block of outputs, block of inputs. Axis 1: episodes."""
    inputs: tl.constexpr = D // BLOCK_I
    blocks: tl.constexpr = inputs * (D // BLOCK_O)
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    role, block = program // blocks, program % blocks
    out_column, in_column = (block // inputs) * BLOCK_O, (block % inputs) * BLOCK_I
    first_image = episode * images
    first_row = first_image * classes
    to_weight, to_bias = episode * (D * D), episode * D
    scale = input_scale(logit_scale, FACTOR)
    value_at: tl.constexpr = KEY_ON
    rational_at: tl.constexpr = value_at + VALUE_ON
    output_at: tl.constexpr = rational_at + RATIONAL_ON
    text_at: tl.constexpr = output_at + OUTPUT_ON
    image_at: tl.constexpr = text_at + TEXT_ON
    if role < output_at:
        if output_at > 0:
            # doffset has these pointers' type; one of the roles below replaces it.
            gradient, weight, bias = doffset, output_weight, output_bias
            if KEY_ON:
                if role == 0:
                    gradient, weight, bias = dkeys, key_weight, key_bias
            if VALUE_ON:
                if role == value_at:
                    gradient, weight, bias = dvalues, value_weight, value_bias
            if RATIONAL_ON:
                if role == rational_at:
                    gradient, weight, bias = dq_rational, rational_weight, rational_bias
            if BIAS:
                bias += to_bias
            _block(
                image, text, attended_text, attended_rational, attended_image, factors, gradient, weight + to_weight,
                bias, first_row, first_image, images, classes, total_rows, out_column, in_column, share, scale,
                0, D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, TWO, BIAS, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif role < text_at:
        if OUTPUT_ON:
            bias = output_bias
            if BIAS:
                bias += to_bias
            _block(
                image, text, attended_text, attended_rational, attended_image, factors, doffset,
                output_weight + to_weight, bias, first_row, first_image, images, classes, total_rows, out_column,
                in_column, share, 1.0,
                1, D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, TWO, BIAS, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif role < image_at:
        if TEXT_ON:
            bias = text_bias
            if BIAS:
                bias += to_bias
            _block(
                image, text, attended_text, attended_rational, attended_image, factors, dq_text,
                text_weight + to_weight, bias, first_row, first_image, images, classes, total_rows, out_column,
                in_column, share, tl.sqrt(scale),
                2, D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, TWO, BIAS, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif IMAGE_ON:
        bias = image_bias
        if BIAS:
            bias += to_bias
        _block(
            image, text, attended_text, attended_rational, attended_image, factors, dq_image,
            image_weight + to_weight, bias, first_row, first_image, images, classes, total_rows, out_column,
            in_column, share, tl.sqrt(scale),
            3, D, HEAD, TEXT, RATIONAL, IMAGE, MATRIX, TWO, BIAS, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
        )  # fmt: skip


def parameter_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Attended,
    gradients: ProjectionBuffers | None,
    doffset: Tensor,
    wanted: dict[str, Tensor],
    *,
    num_heads: int,
    bias: bool,
    scale_factor: float,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the weights in `wanted` and, with bias=True, of their biases, in one launch.

    gradients: of the projections, as class_attention_backward makes them, None where the output's alone is wanted;
    doffset: dA.
    wanted: by role (see ROLES) the weight itself, (D, D) or (E, D, D), all alike; its gradient has its shape and dtype.
    """
    weights = {role: torch.empty_like(value, memory_format=torch.contiguous_format) for role, value in wanted.items()}
    biases = {role: value.new_empty(value.shape[:-1]) for role, value in weights.items()} if bias else {}
    (batch, width), classes = image.shape, text.shape[0]
    if batch == 0:
        return {role: value.zero_() for role, value in weights.items()}, {
            role: value.zero_() for role, value in biases.items()
        }
    if not wanted:
        return weights, biases
    one = next(iter(weights.values()))
    episodes = one.shape[0] if one.ndim == 3 else 1
    images, dtype = batch // episodes, doffset.dtype
    tile = tile or tile_of(dtype, width, precision)
    inner = gradients or ProjectionBuffers(None, None, None, None, None)
    kinds = [attended.text is not None, attended.rational is not None, attended.image is not None]
    # Without biases their pointers are the weights', so that the kernel has something to choose from; none is written.
    pointers = [part.get(role) for role in ROLES for part in (weights, biases if bias else weights)]
    if "output" not in wanted:
        # A pointer of the right type for the kernel to choose from; it is never written.
        pointers[6], pointers[7] = one, next(iter(biases.values()), one)
    parameter_gradients_kernel[(len(weights) * (width // tile.outputs) * (width // tile.inputs), episodes)](
        image, text, logit_scale, attended.text, attended.rational, attended.image, attended.factors,
        inner.keys, inner.values, inner.q_rational, doffset, inner.q_text, inner.q_image,
        *pointers, images, classes, batch * classes, 1 / sum(kinds),
        **{f"{role.upper()}_ON": int(role in weights) for role in ROLES},
        D=width, HEAD=width // num_heads, TEXT=kinds[0], RATIONAL=kinds[1], IMAGE=kinds[2],
        MATRIX=attended.factors is not None, FACTOR=scale_factor, TWO=classes >= tile.rows, BIAS=bias,
        BLOCK_O=tile.outputs, BLOCK_I=tile.inputs, BLOCK_R=tile.rows,
        COMPUTE=_TYPES[dtype], PRECISION=default_precision(dtype, precision),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return weights, biases


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
