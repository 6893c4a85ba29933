"""Compute the gradients of all weights and biases in one launch.

    dW[o, c] = sum_rows dY[row, o] X[row, c],   dbias[o] = sum_rows dY[row, o]

A projection with weight W and bias maps its input X to Y = X W^T + bias. X is scale R for keys, values and the rational
query, sqrt(scale) T and sqrt(scale) f for the text and image queries, and O, the attention's result, for the output
projection; R and O are computed where they are used. A program owns one block of one weight of one episode and goes
through all rows, always in the same order, so no partial sums are left to add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    attended_rows,
    block_of,
    default_precision,
    episode_grid,
    input_scale,
    product,
    rational_rows,
    store_column_sums,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import A100, Target, first_fitting, operand_bytes, target_of
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.rational_projections import ProjectionBuffers

ROLE_ORDER = ("key", "value", "rational", "output", "text", "image")
"""The roles in the order of their programs. The first four go through B K rows and start first."""
_WEIGHTS, _BIASES = (tuple(f"{role}_{part}" for role in ROLE_ORDER) for part in ("weight", "bias"))
"""The kernel's parameters for the gradients of the weights and biases, in the order of the roles."""


@dataclass(frozen=True)
class Tile:
    """Hold the outputs and inputs of a weight's block, the rows of a step, and the warps and pipeline stages."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


def tile_of(
    dtype: torch.dtype,
    classes: int,
    width: int,
    head: int,
    precision: str = "ieee",
    *,
    features: torch.dtype | None = None,
    target: Target = A100,
) -> Tile:
    """Return the tile for a problem: the table's, or a smaller one where that does not fit the target.

    features: the type in which the features lie in memory; None takes dtype.
    """
    return first_fitting(
        _table(dtype, width, precision),
        ("rows", "outputs", "inputs"),
        lambda tile: shared_bytes(tile, dtype, classes, head, features or dtype, target),
        target,
    )


def shared_bytes(tile: Tile, dtype: torch.dtype, classes: int, head: int, features: torch.dtype, target: Target) -> int:
    """Return an upper bound of the shared memory that a launch needs, for all weights and query kinds.

    _shared_memory.py explains the formula. Only one of the inputs X is read in each program.
    """
    gradient, x = tile.rows * tile.outputs, tile.rows * tile.inputs
    # Features of images: one row for each row of the tile, or those of two images (image_rows in _common.py).
    images = 2 * tile.inputs if classes >= tile.rows else x
    factors = 2 * 4 * (tile.rows if head % tile.inputs == 0 else x)
    loaded = max(
        gradient * dtype.itemsize + (x + images) * features.itemsize,  # R
        gradient * dtype.itemsize + 2 * x * dtype.itemsize + 4 * images + factors,  # O
        4 * gradient + x * features.itemsize,  # f, with a gradient in float32
    )
    needed = (tile.stages - 1) * loaded + operand_bytes(target, dtype, gradient, x)
    return max(needed, 4 * tile.outputs * tile.inputs)


def _table(dtype: torch.dtype, width: int, precision: str) -> Tile:
    """Return the tile for the A100's registers and number of multiprocessors."""
    if dtype == torch.float32:
        # Reductions are short, as in class_attention. TF32 products have one stage, and 16 rows for each warp.
        block = block_of(width, 64)
        return Tile(block, block, 16, 4, 2) if precision == "ieee" else Tile(block, block, 16, block // 16, 1)
    # With tiles of 128 x 64 the four weights that go through B K rows take 128 programs at D = 512, for the A100's 108
    # multiprocessors; with 128 x 128 they would take 64.
    return Tile(block_of(width, 128), block_of(width, 64), 64, 8, 3)


@triton.jit
def _block(
    features,
    attended,
    dy,
    weight,
    bias,
    episode,
    images,
    classes,
    first_output,
    first_input,
    share,
    scale,
    SOURCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store one block of one weight's gradient, and the gradient of the bias beside it.

    features: (image, text).
    dy: the gradient dY of the projection's result.
    weight, bias: the arrays that receive the gradients.
    SOURCE: the input X of the projection: 0 for R, 1 for O, 2 for T (dY is then summed over the images), 3 for f.
    """
    image, text = features
    first_image = episode * images
    first_row = first_image * classes
    o = first_output + tl.arange(0, BLOCK_O)
    i = first_input + tl.arange(0, BLOCK_I)
    rows = images * classes
    if SOURCE == 2:
        rows = classes
    elif SOURCE == 3:
        rows = images
    accumulator = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = row < rows
        tile = (start, row, valid, rows, classes, first_image)
        if SOURCE == 0:
            x = rational_rows(features, tile, i, D, BLOCK_R, TWO_IMAGES)
        elif SOURCE == 1:
            x = attended_rows(attended, tile, i, first_input, share, D, HEAD, BLOCK_R, BLOCK_I, TWO_IMAGES)
        elif SOURCE == 2:
            x = tl.load(text + row[:, None] * D + i[None, :], mask=valid[:, None], other=0.0)
        else:
            x = tl.load(image + (first_image + row)[:, None] * D + i[None, :], mask=valid[:, None], other=0.0)
        if SOURCE == 2:
            y = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
            for b in range(images):
                offsets = (first_row + b * classes + row)[:, None] * D + o[None, :]
                y += tl.load(dy + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
        elif SOURCE == 3:
            y = tl.load(dy + (first_image + row)[:, None] * D + o[None, :], mask=valid[:, None], other=0.0)
        else:
            y = tl.load(dy + (first_row + row)[:, None] * D + o[None, :], mask=valid[:, None], other=0.0)
        accumulator = product(tl.trans(y.to(COMPUTE)), x.to(COMPUTE), accumulator, PRECISION)
    weight += episode * (D * D)
    tl.store(weight + o[:, None] * D + i[None, :], (accumulator * scale).to(weight.dtype.element_ty))
    if HAS_BIAS:
        bias += episode * D
        if first_input == 0:
            # One program in D / BLOCK_I reads dY again, from the cache.
            total = tl.zeros((BLOCK_O,), tl.float32)
            bias_rows = rows
            if SOURCE == 2:
                bias_rows = images * classes
            first = first_row
            if SOURCE == 3:
                first = first_image
            for start in range(0, bias_rows, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)
                offsets = (first + row)[:, None] * D + o[None, :]
                y = tl.load(dy + offsets, mask=(row < bias_rows)[:, None], other=0.0)
                total += tl.sum(y.to(tl.float32), 0)
            store_column_sums(bias + o, total, o < D, BLOCK_R, BLOCK_O)


@Kernel
def parameter_gradients_kernel(
    image,
    text,
    logit_scale,
    attended_text,
    attended_rational,
    attended_image,
    factors,
    dkeys,
    dvalues,
    dq_rational,
    doffset,
    dq_text,
    dq_image,
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    rational_weight,
    rational_bias,
    output_weight,
    output_bias,
    text_weight,
    text_bias,
    image_weight,
    image_bias,
    images,
    classes,
    total_rows,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one block of the gradient of one weight, and of its bias.

    Axis 0 of the grid: role among those asked for, block of outputs, block of inputs. Axis 1: episodes.
    A role is asked for where its weight is not None, the output projection where HAS_OUTPUT is 1.
    """
    inputs: tl.constexpr = D // BLOCK_I
    blocks: tl.constexpr = inputs * (D // BLOCK_O)
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    role, block = program // blocks, program % blocks
    first_output, first_input = (block // inputs) * BLOCK_O, (block % inputs) * BLOCK_I
    features = (image, text)
    attended = (attended_text, attended_rational, attended_image, factors, total_rows)
    scale = input_scale(logit_scale, FACTOR)
    value_role: tl.constexpr = 0 if key_weight is None else 1
    rational_role: tl.constexpr = value_role + (0 if value_weight is None else 1)
    output_role: tl.constexpr = rational_role + (0 if rational_weight is None else 1)
    text_role: tl.constexpr = output_role + HAS_OUTPUT
    image_role: tl.constexpr = text_role + (0 if text_weight is None else 1)
    if role < output_role:
        if output_role > 0:
            # The output projection's pointers have the right types; those of one of the roles below replace them.
            dy, weight, bias = doffset, output_weight, output_bias
            if key_weight is not None:
                if role == 0:
                    dy, weight, bias = dkeys, key_weight, key_bias
            if value_weight is not None:
                if role == value_role:
                    dy, weight, bias = dvalues, value_weight, value_bias
            if rational_weight is not None:
                if role == rational_role:
                    dy, weight, bias = dq_rational, rational_weight, rational_bias
            _block(
                features, attended, dy, weight, bias, episode, images, classes, first_output, first_input, share, scale,
                0, HAS_BIAS, TWO_IMAGES, D, HEAD, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif role < text_role:
        if HAS_OUTPUT:
            _block(
                features, attended, doffset, output_weight, output_bias, episode, images, classes, first_output,
                first_input, share, 1.0,
                1, HAS_BIAS, TWO_IMAGES, D, HEAD, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif role < image_role:
        if text_weight is not None:
            _block(
                features, attended, dq_text, text_weight, text_bias, episode, images, classes, first_output,
                first_input, share, tl.sqrt(scale),
                2, HAS_BIAS, TWO_IMAGES, D, HEAD, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
            )  # fmt: skip
    elif image_weight is not None:
        _block(
            features, attended, dq_image, image_weight, image_bias, episode, images, classes, first_output, first_input,
            share, tl.sqrt(scale),
            3, HAS_BIAS, TWO_IMAGES, D, HEAD, BLOCK_O, BLOCK_I, BLOCK_R, COMPUTE, PRECISION,
        )  # fmt: skip


@remembered
def _launch(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    roles: tuple[str, ...],
    kinds: int,
    scale_factor: float,
    episodes: int,
    bias: bool,
    dtype: torch.dtype,
    features: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> Launch:
    """Return the launch for the gradients of the weights in `roles`.

    kinds: the number of query kinds in use. features: the type in which the features lie in memory.
    """
    head = width // num_heads
    tile = tile or tile_of(dtype, classes, width, head, precision, features=features, target=target)
    programs = len(roles) * (width // tile.outputs) * (width // tile.inputs)
    return parameter_gradients_kernel.launch(
        episode_grid(programs, episodes=episodes),
        images=batch // episodes, classes=classes, total_rows=batch * classes, share=1 / kinds,
        D=width, HEAD=head, FACTOR=scale_factor, HAS_OUTPUT=int("output" in roles), HAS_BIAS=bias,
        TWO_IMAGES=classes >= tile.rows, BLOCK_O=tile.outputs, BLOCK_I=tile.inputs, BLOCK_R=tile.rows,
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision),
        num_warps=tile.warps, num_stages=tile.stages,
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
    """Compute the gradients of the weights in `wanted` and, with bias=True, of their biases, in one launch.

    gradients: the projections' gradients from class_attention_backward; None if only the output projection is wanted.
    doffset: dA, the gradient of the output projection's result.
    wanted: the weights by role (see ROLE_ORDER), all (D, D) or all (E, D, D). A gradient has its weight's shape and
        dtype.
    """
    weights = {role: torch.empty_like(value, memory_format=torch.contiguous_format) for role, value in wanted.items()}
    biases = {role: value.new_empty(value.shape[:-1]) for role, value in weights.items()} if bias else {}
    (batch, width), classes = image.shape, text.shape[0]
    if batch == 0:
        for value in (*weights.values(), *biases.values()):
            value.zero_()
        return weights, biases
    if not wanted:
        return weights, biases
    some_weight = next(iter(weights.values()))
    episodes = some_weight.shape[0] if some_weight.ndim == 3 else 1
    inner = gradients or ProjectionBuffers(None, None, None, None, None)
    # The kernel chooses among the pointers of several roles. So an output projection that is not asked for needs
    # pointers of the right type, and biases that do not exist need some pointer; neither is written to.
    weight_pointers = {"output": some_weight} | weights
    bias_pointers = {"output": next(iter(biases.values()))} | biases if bias else weight_pointers
    launch = _launch(
        batch, classes, width, num_heads, tuple(weights), attended.kinds, scale_factor, episodes, bias, doffset.dtype,
        text.dtype, precision, target_of(text.device), tile,
    )  # fmt: skip
    launch(
        image=image, text=text, logit_scale=logit_scale,
        attended_text=attended.text, attended_rational=attended.rational, attended_image=attended.image,
        factors=attended.factors,
        dkeys=inner.keys, dvalues=inner.values, dq_rational=inner.q_rational, doffset=doffset, dq_text=inner.q_text,
        dq_image=inner.q_image,
        **dict(zip(_WEIGHTS, map(weight_pointers.get, ROLE_ORDER), strict=True)),
        **dict(zip(_BIASES, map(bias_pointers.get, ROLE_ORDER), strict=True)),
    )  # fmt: skip
    return weights, biases
