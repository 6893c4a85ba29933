"""Compute the gradients of all weights and biases in one launch, for an output projection that is zero.

    dA[b, k] = s dlogits[b, k] R[b, k] + dM[b, k],   dWo[o, i] = sum_bk dA[b, k, o] O[b, k, i],   dbo = sum_bk dA[b, k]

Wo and bo are the output projection's weight and bias, O the attention's result, R the rational matrix, and dM the
gradient of the mask where one is given. Every mask is 1 then, where relu passes the gradient on and no penalty has one.
As dO = dA Wo is zero, so are the gradients of all other parameters. Test-time training starts like this.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    COMPUTE_TYPES,
    attended_rows,
    block_of,
    default_precision,
    episode_grid,
    product,
    rational_rows,
    store_column_sums,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.class_attention import Attended


@Kernel
def output_projection_gradients_kernel(
    image,
    text,
    logit_scale,
    attended_text,
    attended_rational,
    attended_image,
    factors,
    dlogits,
    dmask,
    dweight,
    dbias,
    zeros,
    images,
    classes,
    total_rows,
    num_zeros,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TWO_IMAGES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a block of dWo or of dbo, and set a part of the other gradients to zero.

    Axis 0 of the grid: block of outputs, and in it the blocks of inputs, then the bias. Axis 1: episodes.
    zeros: num_zeros gradients that are zero, of all episodes.
    """
    inputs: tl.constexpr = D // BLOCK_I
    program, episode = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if zeros is not None:
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        for first in range((episode * tl.num_programs(0) + program) * BLOCK_Z, num_zeros, programs * BLOCK_Z):
            z = first + tl.arange(0, BLOCK_Z)
            tl.store(zeros + z, tl.zeros((BLOCK_Z,), zeros.dtype.element_ty), mask=z < num_zeros)
    block = program % (inputs + 1)
    o = program // (inputs + 1) * BLOCK_O + tl.arange(0, BLOCK_O)
    first_input = tl.minimum(block, inputs - 1) * BLOCK_I
    i = first_input + tl.arange(0, BLOCK_I)
    attended = (attended_text, attended_rational, attended_image, factors, total_rows)
    first_image = episode * images
    first_row = first_image * classes
    rows = images * classes
    scale = tl.load(logit_scale).to(tl.float32)
    accumulator = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = row < rows
        tile = (start, row, valid, rows, classes, first_image)
        da = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
        if dlogits is not None:
            g = tl.load(dlogits + first_row + row, mask=valid, other=0.0).to(tl.float32) * scale
            da += g[:, None] * rational_rows((image, text), tile, o, D, BLOCK_R, TWO_IMAGES)
        if dmask is not None:
            offsets = (first_row + row)[:, None] * D + o[None, :]
            da += tl.load(dmask + offsets, mask=valid[:, None], other=0.0).to(tl.float32)
        if block < inputs:
            x = attended_rows(attended, tile, i, first_input, share, D, HEAD, BLOCK_R, BLOCK_I, TWO_IMAGES)
            accumulator = product(tl.trans(da.to(COMPUTE)), x.to(COMPUTE), accumulator, PRECISION)
        else:
            # The bias adds up the same numbers that the weight's products multiply.
            sums += da.to(COMPUTE).to(tl.float32)
    if block < inputs:
        offsets = episode * (D * D) + o[:, None] * D + i[None, :]
        tl.store(dweight + offsets, accumulator.to(dweight.dtype.element_ty))
    elif dbias is not None:
        store_column_sums(dbias + episode * D + o, tl.sum(sums, 0), o < D, BLOCK_R, BLOCK_O)


@remembered
def _launch(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    kinds: int,
    episodes: int,
    num_zeros: int,
    dtype: torch.dtype,
    precision: str,
    target: Target,
) -> Launch:
    """Return the launch. kinds: the number of query kinds in use."""
    float32 = dtype == torch.float32
    # In bfloat16 many small blocks occupy the multiprocessors; products of three TF32 ones keep 16 rows for each warp.
    block_o, block_i, block_r = block_of(width, 64), block_of(width, 64 if float32 else 32), 16 if float32 else 64
    if not float32 and classes < block_r and target.capability in (86, 89):
        # The compiler allows a thread 128 registers there, and 64 rows of several images spill.
        block_r = 32
    return output_projection_gradients_kernel.launch(
        episode_grid(width // block_o * (width // block_i + 1), episodes=episodes),
        images=batch // episodes, classes=classes, total_rows=batch * classes, num_zeros=num_zeros, share=1 / kinds,
        D=width, HEAD=width // num_heads, TWO_IMAGES=classes >= block_r,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=block_r, BLOCK_Z=1024,
        COMPUTE=COMPUTE_TYPES[dtype], PRECISION=default_precision(dtype, precision),
        num_warps=block_o // 16, num_stages=1 if float32 else 2,
    )  # fmt: skip


def output_projection_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    attended: Attended,
    dlogits: Tensor | None,
    dmask: Tensor | None,
    wanted: dict[str, Tensor],
    *,
    num_heads: int,
    bias: bool,
    dtype: torch.dtype | None = None,
    precision: str = "ieee",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the gradients of the weights in `wanted` and, with bias=True, of their biases, in one launch.

    The results are those of parameter_gradients while the output projection's weight and bias are zero.

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
        batch, classes, width, num_heads, attended.kinds, episodes, 0 if zeros is None else zeros.numel(), dtype,
        precision, target_of(image.device),
    )  # fmt: skip
    launch(
        image=image, text=text, logit_scale=logit_scale,
        attended_text=attended.text, attended_rational=attended.rational, attended_image=attended.image,
        factors=attended.factors, dlogits=dlogits, dmask=dmask,
        dweight=dweight, dbias=dbias, zeros=zeros,
    )  # fmt: skip
    return weights, biases
