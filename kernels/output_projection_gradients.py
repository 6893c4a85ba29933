"""Compute the gradients of all weights and biases in one launch, for an output projection that is zero.

    dA[b, k] = s dlogits[b, k] R[b, k] + dM[b, k],   dWo[o, i] = sum_bk dA[b, k, o] O[b, k, i],   dbo = sum_bk dA[b, k]

Wo and bo are the output projection's weight and bias, O the attention's result, R the rational matrix, and dM the
gradient of the mask where one is given. Every mask is 1 then, where relu passes the gradient on and no penalty has one.
As dO = dA Wo is zero, so are the gradients of all other parameters. Test-time training starts like this.

dA is never computed, because R[b, k, o] = f[b, o] T[k, o]:

    sum_bk s dlogits[b, k] R[b, k, o] O[b, k, i] = s sum_b f[b, o] (T^T (dlogits_b O_b))[o, i]

Rows of different images are never multiplied together, so that the image's features can be multiplied by its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    block_of,
    default_precision,
    episode_grid,
    product,
    rational_rows,
    store_column_sums,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import A100, Target, target_of

BIAS_COLUMNS = 32
"""The most columns of a program that adds up the bias's gradient."""


@triton.jit
def _add_rational(
    total,
    image,
    text,
    dlogits,
    attended,
    o,
    i,
    images,
    classes,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add sum_b f[b] (T^T (dlogits_b O_b)) to a block.

    image, dlogits, attended: those of the episode's first image. The accumulator holds one image's product. All images
    share one loop, so that the loads of the next image start during the products of this one.
    """
    steps = (classes + BLOCK_R - 1) // BLOCK_R
    accumulator = tl.zeros(total.shape, tl.float32)
    for step in range(images * steps):
        b = step // steps
        k = (step % steps) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = k < classes
        row = tl.cast(b, tl.int64) * classes + k
        t = tl.load(text + k[:, None] * D + o[None, :], mask=valid[:, None], other=0.0)
        x = tl.load(attended + row[:, None] * D + i[None, :], mask=valid[:, None], other=0.0)
        g = tl.load(dlogits + row, mask=valid, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * g[:, None]).to(COMPUTE)
        accumulator = product(tl.trans(t.to(COMPUTE)), x, accumulator, PRECISION)
        if step % steps == steps - 1:
            f = tl.load(image + b * D + o).to(tl.float32)
            total += accumulator * f[:, None]
            accumulator = tl.zeros(total.shape, tl.float32)
    return total


@triton.jit
def _add_masks(
    total,
    dmask,
    attended,
    o,
    i,
    rows,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dM^T O to a block. dmask, attended: those of the episode's first image."""
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < rows)[:, None]
        y = tl.load(dmask + row[:, None] * D + o[None, :], mask=valid, other=0.0)
        x = tl.load(attended + row[:, None] * D + i[None, :], mask=valid, other=0.0)
        total = product(tl.trans(y.to(COMPUTE)), x, total, PRECISION)
    return total


@Kernel
def output_projection_gradients_kernel(
    image,
    text,
    logit_scale,
    attended,
    dlogits,
    dmask,
    dweight,
    dbias,
    zeros,
    images,
    classes,
    num_zeros,
    D: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a block of dWo or of dbo, and set a part of the other gradients to zero.

    Axis 0 of the grid: first the blocks of dbo, if there is one; then block of outputs and block of inputs of dWo. Axis
    1: episodes.
    zeros: num_zeros gradients that are zero, of all episodes.
    """
    inputs: tl.constexpr = D // BLOCK_I
    bias_programs: tl.constexpr = 0 if dbias is None else D // BIAS_COLUMNS
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if zeros is not None:
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        for first in range((episode * tl.num_programs(0) + program) * BLOCK_Z, num_zeros, programs * BLOCK_Z):
            z = first + tl.arange(0, BLOCK_Z)
            tl.store(zeros + z, tl.zeros((BLOCK_Z,), zeros.dtype.element_ty), mask=z < num_zeros)
    first_image = episode * images
    first_row = first_image * classes
    rows = images * classes
    scale = tl.load(logit_scale).to(tl.float32)
    if dbias is not None:
        if program < bias_programs:
            column = program * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
            sums = tl.zeros((BIAS_ROWS, BIAS_COLUMNS), tl.float32)
            for start in range(0, rows, BIAS_ROWS):
                row = start + tl.arange(0, BIAS_ROWS)
                valid = row < rows
                if dlogits is not None:
                    g = tl.load(dlogits + first_row + row, mask=valid, other=0.0).to(tl.float32) * scale
                    tile = (start, row, valid, rows, classes, first_image)
                    sums += g[:, None] * rational_rows((image, text), tile, column, D, BIAS_ROWS, TWO_IMAGES)
                if dmask is not None:
                    offsets = (first_row + row)[:, None] * D + column[None, :]
                    sums += tl.load(dmask + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
            store_column_sums(dbias + episode * D + column, tl.sum(sums, 0), column < D, BIAS_ROWS, BIAS_COLUMNS)
            return
    block = program - bias_programs
    o = block // inputs * BLOCK_O + tl.arange(0, BLOCK_O)
    i = block % inputs * BLOCK_I + tl.arange(0, BLOCK_I)
    attended += first_row * D
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if dlogits is not None:
        total = scale * _add_rational(
            total, image + first_image * D, text, dlogits + first_row, attended, o, i, images, classes, D, BLOCK_R,
            COMPUTE, PRECISION,
        )  # fmt: skip
    if dmask is not None:
        total = _add_masks(total, dmask + first_row * D, attended, o, i, rows, D, BLOCK_R, COMPUTE, PRECISION)
    tl.store(dweight + episode * (D * D) + o[:, None] * D + i[None, :], total.to(dweight.dtype.element_ty))


@remembered
def _launch(
    batch: int,
    classes: int,
    width: int,
    episodes: int,
    num_zeros: int,
    bias: bool,
    dtype: torch.dtype,
    precision: str,
    target: Target,
) -> Launch:
    # Many small blocks occupy the multiprocessors. Products of three TF32 ones keep 16 outputs for each warp, and two
    # warps do not multiply by wgmma, for which the parts of an operand would go through shared memory on Hopper.
    float32 = dtype == torch.float32
    block_o, block_i = (32, 64) if float32 and precision != "ieee" else (64, 32)
    block_o, block_i, block_r = block_of(width, block_o), block_of(width, block_i), 32 if float32 else 64
    warps, columns = max(1, block_o // 16), block_of(width, BIAS_COLUMNS)
    bias_rows = 32 * warps
    return output_projection_gradients_kernel.launch(
        episode_grid(width // block_o * (width // block_i) + bias * (width // columns), episodes=episodes),
        images=batch // episodes, classes=classes, num_zeros=num_zeros,
        D=width, TWO_IMAGES=classes >= bias_rows,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=block_r, BLOCK_Z=1024, BIAS_ROWS=bias_rows, BIAS_COLUMNS=columns,
        # Six bfloat16 products spill on Hopper.
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision, A100),
        num_warps=warps, num_stages=3,
    )  # fmt: skip


def output_projection_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Tensor,
    dlogits: Tensor | None,
    dmask: Tensor | None,
    wanted: dict[str, Tensor],
    *,
    bias: bool,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the gradients of the weights in `wanted` and, with bias=True, of their biases, in one launch.

    The results are those of parameter_gradients while the output projection's weight and bias are zero.

    attended: O, (B, K, D), the result of class_attention_forward.
    wanted: the weights by role, among them "output", all (D, D) or all (E, D, D). A gradient has its weight's shape
        and dtype.
    """
    (batch, width), classes, output = image.shape, text.shape[0], wanted["output"]
    episodes = output.shape[0] if output.ndim == 3 else 1
    dtype = dtype or text.dtype
    dweight = torch.empty_like(output, memory_format=torch.contiguous_format)
    dbias = dweight.new_empty(dweight.shape[:-1]) if bias else None
    # The gradients that are zero lie in one buffer: first those of all weights, then those of all biases.
    others = [role for role in wanted if role != "output"]
    size, bias_size = dweight.numel(), dweight.numel() // width if bias else 0
    zeros = dweight.new_empty(len(others) * (size + bias_size)) if others else None
    weights, biases = {"output": dweight}, {} if dbias is None else {"output": dbias}
    if zeros is not None:
        after_weights = len(others) * size
        for at, role in enumerate(others):
            weights[role] = zeros[at * size : (at + 1) * size].view(dweight.shape)
            if bias:
                first = after_weights + at * bias_size
                biases[role] = zeros[first : first + bias_size].view(dweight.shape[:-1])
    if batch == 0:
        for value in (*weights.values(), *biases.values()):
            value.zero_()
        return weights, biases
    launch = _launch(
        batch, classes, width, episodes, 0 if zeros is None else zeros.numel(), bias, dtype, precision,
        target_of(image.device),
    )  # fmt: skip
    launch(
        image=image, text=text, logit_scale=logit_scale, attended=attended, dlogits=dlogits, dmask=dmask,
        dweight=dweight, dbias=dbias, zeros=zeros,
    )  # fmt: skip
    return weights, biases
