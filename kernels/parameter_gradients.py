"""Compute the gradients of all weights and biases in one launch.

    dW[o, c] = sum_rows dY[row, o] X[row, c],   dbias[o] = sum_rows dY[row, o]

A projection with weight W and bias maps its input X to Y = X W^T + bias. X is scale R for keys, values and the rational
query, sqrt(scale) T and sqrt(scale) f for the text and image queries, and O, the attention's result, for the output
projection; masked_logits_backward has stored O. R is never computed:

    sum_bk dY[b, k, o] f[b, c] T[k, c] = sum_b f[b, c] (dY_b^T T)[o, c]

So both operands of the product of one image can be loaded ahead of their use, and multiplied from shared memory. Its
result, in float32, is added to the block times the image's features. Rows of different images are never multiplied
together: an image is divided into steps of equal length, and a shorter step for the classes that are left over.

A program owns one block of one weight of one episode, or some columns of one bias, and goes through all rows, always in
the same order, so no partial sums are left to add. The longest programs come first, and those of the biases last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    block_of,
    default_precision,
    episode_grid,
    input_scale,
    operand,
    product_of,
    store_column_sums,
    transposed,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import A100, MIN_EXTENT, Target, first_fitting, operand_bytes, target_of
from rada_fast.kernels.rational_projections import ProjectionBuffers

ROLE_ORDER = ("key", "value", "rational", "output", "text", "image")
"""The roles in the order of their programs. Those that go through B K rows come first."""
_WEIGHTS, _BIASES = (tuple(f"{role}_{part}" for role in ROLE_ORDER) for part in ("weight", "bias"))
"""The kernel's parameters for the gradients of the weights and biases, in the order of the roles."""
IMAGES_AT_ONCE = tl.constexpr(4)
"""The number of images whose gradients of the text query are loaded together."""
BIAS_COLUMNS = 32
"""The most columns of a program that adds up a bias's gradient."""


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
    width: int,
    precision: str = "ieee",
    *,
    features: torch.dtype | None = None,
    target: Target = A100,
) -> Tile:
    """Return the tile for a problem: the table's, or a smaller one where that does not fit the target.

    features: the type in which the features lie in memory; None takes dtype.
    """
    features = features or dtype
    return first_fitting(
        _table(dtype, width, precision, features, target),
        ("rows", "outputs", "inputs"),
        lambda tile: shared_bytes(tile, dtype, features, target),
        target,
    )


def shared_bytes(tile: Tile, dtype: torch.dtype, features: torch.dtype, target: Target) -> int:
    """Return an upper bound of the shared memory that a launch needs, for all weights.

    _shared_memory.py explains the formula. T needs the most memory of the inputs X. The text query's gradients are
    added up in registers, and then lie in shared memory beside T.
    """
    gradient, x = tile.rows * tile.outputs, tile.rows * tile.inputs
    loaded = gradient * dtype.itemsize + x * features.itemsize
    return max(
        (tile.stages - 1) * loaded + operand_bytes(target, dtype, gradient, x),
        (gradient + x) * dtype.itemsize,
        4 * tile.outputs * tile.inputs,
    )


def _table(dtype: torch.dtype, width: int, precision: str, features: torch.dtype, target: Target) -> Tile:
    """Return the tile for the target's registers and number of multiprocessors: 108 on the A100, 132 on the H100.

    A program's block is in registers twice: the sum over images, and the product of one image.
    """
    if dtype == torch.float32:
        outputs = block_of(width, 64)
        if precision == "ieee":
            return Tile(outputs, outputs, 16, 4, 2)
        # TF32 operands are split in registers, so blocks are smaller. A warp has 16 of a block's outputs: more warps
        # would compute and store the same elements.
        if default_precision(dtype, precision, target) == "bf16x6":
            # With three stages Triton 3.6 spills 96 bytes.
            return Tile(outputs, block_of(width, 128), 32, 4, 2)
        if target.is_hopper:
            # Four warps would multiply by wgmma, for which the operands go through shared memory once more. Two use the
            # A100's instruction, and were 1.1 to 1.3 times as fast with three TF32 products.
            return Tile(block_of(width, 32), block_of(width, 64), 32, 2, 3)
        return Tile(outputs, block_of(width, 32), 32, max(1, outputs // 16), 3)
    if target.keeps_operands and features == dtype:
        # At D = 512 the four weights that go through B K rows take 128 programs. Wider blocks read less from the cache,
        # which limits the speed.
        return Tile(block_of(width, 64), block_of(width, 128), 64, 4, 3)
    # These four weights take 256 programs at D = 512, of which a multiprocessor holds three. Where the A100's threads
    # also convert the features, as many columns of them would spill.
    converts = features != dtype and not target.keeps_operands
    # On sm_86 and sm_89 the conversion spills 12 bytes with three stages.
    stages = 2 if converts and target.capability in (86, 89) else 3
    return Tile(block_of(width, 64), block_of(width, 32 if converts else 64), 64, 4, stages)


def remainder(classes: int, rows: int) -> int:
    """Return the rows of a step for the classes that are left over when an image is divided into steps of `rows` rows.

    It is a power of two, at least 16. If it equals `rows`, all steps of an image are alike.
    """
    left = (classes - 1) % rows + 1
    return min(rows, max(16, triton.next_power_of_2(left)))


@triton.jit
def _load_rows(matrix, first, row, end, columns, D: tl.constexpr):
    """Return rows first + row of a matrix with D columns, 0 from row `end` on. A row number may exceed 32 bits."""
    tile = row[:, None] * D + columns[None, :]
    return tl.load(matrix + tl.cast(first, tl.int64) * D + tile, mask=(row < end - first)[:, None], other=0.0)


@triton.jit
def _transposed_product(y, x, accumulator, PRECISION: tl.constexpr):
    """Return y^T x, added to the accumulator."""
    return product_of(transposed(operand(y, PRECISION), PRECISION), operand(x, PRECISION), accumulator, PRECISION)


@triton.jit
def _add_rational(
    total,
    image,
    text,
    dy,
    o,
    i,
    images,
    classes,
    first_class,
    steps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add sum_b f[b] * (dY_b^T T) to a block, for the classes that lie in `steps` steps of ROWS from first_class on.

    image, dy: the features and the gradient of the episode's first image. The accumulator holds one image's product.
    All images share one loop, so that the loads of the next image start during the products of this one.
    """
    row = tl.arange(0, ROWS)
    accumulator = tl.zeros(total.shape, tl.float32)
    f = tl.load(image + i).to(tl.float32)
    for step in range(images * steps):
        b = step // steps
        start = first_class + (step % steps) * ROWS
        y = _load_rows(dy + tl.cast(b, tl.int64) * classes * D, start, row, classes, o, D)
        t = _load_rows(text, start, row, classes, i, D)
        if PRECISION == "bf16x6":
            # This product is a sum of its own in any case. A sum of several steps would take more registers.
            total += _transposed_product(y.to(COMPUTE), t.to(COMPUTE), None, PRECISION) * f[None, :]
        else:
            accumulator = _transposed_product(y.to(COMPUTE), t.to(COMPUTE), accumulator, PRECISION)
        if step % steps == steps - 1:
            if PRECISION != "bf16x6":
                total += accumulator * f[None, :]
                accumulator = tl.zeros(total.shape, tl.float32)
            f = tl.load(image + tl.minimum(b + 1, images - 1) * D + i).to(tl.float32)
    return total


@triton.jit
def _add_product(
    total,
    x,
    dy,
    o,
    i,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dY^T X to a block, where X and dY have `rows` rows."""
    row = tl.arange(0, ROWS)
    for start in tl.range(0, rows, ROWS, num_stages=STAGES):
        y = _load_rows(dy, start, row, rows, o, D)
        loaded = _load_rows(x, start, row, rows, i, D)
        total = _transposed_product(y.to(COMPUTE), loaded.to(COMPUTE), total, PRECISION)
    return total


@triton.jit
def _add_text(
    total,
    text,
    dy,
    o,
    i,
    images,
    classes,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add (sum_b dY_b)^T T to a block. The images' gradients are added up first: one product serves all images."""
    row = tl.arange(0, ROWS)
    for start in range(0, classes, ROWS):
        y = tl.zeros((ROWS, total.shape[0]), tl.float32)
        for first in range(0, images, IMAGES_AT_ONCE):
            # The loads of several images are under way together.
            for j in tl.static_range(IMAGES_AT_ONCE):
                b = first + j
                end = tl.where(b < images, classes, 0)
                y += _load_rows(dy + tl.cast(b, tl.int64) * classes * D, start, row, end, o, D).to(tl.float32)
        t = _load_rows(text, start, row, classes, i, D)
        total = _transposed_product(y.to(COMPUTE), t.to(COMPUTE), total, PRECISION)
    return total


@triton.jit
def _store_block(weight, block, o, i, D: tl.constexpr):
    tl.store(weight + o[:, None] * D + i[None, :], block.to(weight.dtype.element_ty))


@triton.jit
def _store_bias(bias, dy, column, rows, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the sums of dY's columns."""
    row = tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        sums += _load_rows(dy, start, row, rows, column, D).to(tl.float32)
    store_column_sums(bias + column, tl.sum(sums, 0), column < D, BLOCK_R, BLOCK_C)


@Kernel
def parameter_gradients_kernel(
    image,
    text,
    logit_scale,
    attended,
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
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TEXT_PARTS: tl.constexpr,
    REMAINDER: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one block of the gradient of one weight or of one bias.

    Axis 0 of the grid: first the weights, by role, block of outputs and block of inputs; then the biases, by role and
    block of columns. Axis 1: episodes. A role is asked for where its weight is not None, the output projection where
    HAS_OUTPUT is 1. REMAINDER: the rows of the last step of an image, see remainder.
    TEXT_PARTS: the programs among which the outputs of a block are divided for the text query. These programs load the
        gradients of all images for a single product. Some processors have one of them beside a longer program of
        another role, and would finish late with a whole block.
    """
    inputs: tl.constexpr = D // BLOCK_I
    blocks: tl.constexpr = inputs * (D // BLOCK_O)
    bias_blocks: tl.constexpr = D // BIAS_COLUMNS
    value_role: tl.constexpr = 0 if key_weight is None else 1
    rational_role: tl.constexpr = value_role + (0 if value_weight is None else 1)
    output_role: tl.constexpr = rational_role + (0 if rational_weight is None else 1)
    text_role: tl.constexpr = output_role + HAS_OUTPUT
    image_role: tl.constexpr = text_role + (0 if text_weight is None else 1)
    image_programs: tl.constexpr = 0 if image_weight is None else blocks
    text_programs: tl.constexpr = 0 if text_weight is None else TEXT_PARTS * blocks
    weight_programs: tl.constexpr = text_role * blocks + text_programs + image_programs
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    role, block = program // blocks, program % blocks
    if text_weight is not None:
        after_output = program - text_role * blocks
        if after_output >= text_programs:
            role = image_role
        elif after_output >= 0:
            role, block = text_role, after_output
    if HAS_BIAS:
        if program >= weight_programs:
            role, block = (program - weight_programs) // bias_blocks, (program - weight_programs) % bias_blocks
    # The output projection's pointers have the right types; those of the program's role replace them.
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
    if text_weight is not None:
        if role == text_role:
            dy, weight, bias = dq_text, text_weight, text_bias
    if image_weight is not None:
        if role == image_role:
            weight, bias = image_weight, image_bias
            dq_image += episode * images * D
    image += episode * images * D
    dy += episode * images * classes * D
    if HAS_BIAS:
        if program >= weight_programs:
            bias += episode * D
            column = block * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
            if image_weight is not None:
                if role == image_role:
                    _store_bias(bias, dq_image, column, images, D, BIAS_ROWS, BIAS_COLUMNS)
                else:
                    _store_bias(bias, dy, column, images * classes, D, BIAS_ROWS, BIAS_COLUMNS)
            else:
                _store_bias(bias, dy, column, images * classes, D, BIAS_ROWS, BIAS_COLUMNS)
            return
    o = (block // inputs) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (block % inputs) * BLOCK_I + tl.arange(0, BLOCK_I)
    weight += episode * (D * D)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    scale = input_scale(logit_scale, FACTOR)
    if role < output_role:
        if output_role > 0:
            steps = (classes + BLOCK_R - 1) // BLOCK_R if REMAINDER == BLOCK_R else classes // BLOCK_R
            total = _add_rational(
                total, image, text, dy, o, i, images, classes, 0, steps, D, BLOCK_R, COMPUTE, PRECISION
            )
            if REMAINDER < BLOCK_R:
                total = _add_rational(
                    total, image, text, dy, o, i, images, classes, steps * BLOCK_R, 1, D, REMAINDER, COMPUTE, PRECISION
                )
            _store_block(weight, total * scale, o, i, D)
    elif role < text_role:
        if HAS_OUTPUT:
            attended += episode * images * classes * D
            total = _add_product(total, attended, dy, o, i, images * classes, D, BLOCK_R, STAGES, COMPUTE, PRECISION)
            _store_block(weight, total, o, i, D)
    elif role < image_role:
        if text_weight is not None:
            outputs: tl.constexpr = BLOCK_O // TEXT_PARTS
            n = (block // inputs) * outputs + tl.arange(0, outputs)
            half = tl.zeros((outputs, BLOCK_I), tl.float32)
            half = _add_text(half, text, dy, n, i, images, classes, D, BLOCK_R, COMPUTE, PRECISION)
            _store_block(weight, half * tl.sqrt(scale), n, i, D)
    elif image_weight is not None:
        total = _add_product(total, image, dq_image, o, i, images, D, 16, 1, COMPUTE, PRECISION)
        _store_block(weight, total * tl.sqrt(scale), o, i, D)


@remembered
def _launch(
    batch: int,
    classes: int,
    width: int,
    roles: tuple[str, ...],
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

    features: the type in which the features lie in memory.
    """
    tile = tile or tile_of(dtype, width, precision, features=features, target=target)
    bias_columns = block_of(width, BIAS_COLUMNS)
    blocks = (width // tile.outputs) * (width // tile.inputs)
    # In float32 each warp has 16 outputs of a block. With half as many outputs, two warps would compute the same ones.
    text_parts = 2 if dtype != torch.float32 and tile.outputs > MIN_EXTENT else 1
    programs = (len(roles) + ("text" in roles) * (text_parts - 1)) * blocks
    programs += bias * len(roles) * (width // bias_columns)
    return parameter_gradients_kernel.launch(
        episode_grid(programs, episodes=episodes),
        images=batch // episodes, classes=classes,
        D=width, FACTOR=scale_factor, HAS_OUTPUT=int("output" in roles), HAS_BIAS=bias,
        BLOCK_O=tile.outputs, BLOCK_I=tile.inputs, BLOCK_R=tile.rows, TEXT_PARTS=text_parts,
        REMAINDER=remainder(classes, tile.rows), STAGES=tile.stages,
        BIAS_ROWS=(128 // dtype.itemsize) * tile.warps, BIAS_COLUMNS=bias_columns,
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision, target),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def parameter_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Tensor | None,
    gradients: ProjectionBuffers | None,
    doffset: Tensor,
    wanted: dict[str, Tensor],
    *,
    bias: bool,
    scale_factor: float,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the gradients of the weights in `wanted` and, with bias=True, of their biases, in one launch.

    attended: the output projection's input O from masked_logits_backward; None if that projection is not wanted.
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
        batch, classes, width, tuple(weights), scale_factor, episodes, bias, doffset.dtype, text.dtype, precision,
        target_of(text.device), tile,
    )  # fmt: skip
    launch(
        image=image, text=text, logit_scale=logit_scale, attended=attended,
        dkeys=inner.keys, dvalues=inner.values, dq_rational=inner.q_rational, doffset=doffset, dq_text=inner.q_text,
        dq_image=inner.q_image,
        **dict(zip(_WEIGHTS, map(weight_pointers.get, ROLE_ORDER), strict=True)),
        **dict(zip(_BIASES, map(bias_pointers.get, ROLE_ORDER), strict=True)),
    )  # fmt: skip
    return weights, biases
