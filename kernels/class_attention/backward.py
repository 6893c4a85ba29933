"""Backward pass of the attention over classes; the package's docstring explains the symbols.

    dP[i, j] = dO[i] . v[j],   dS^c = P^c * (dP - delta^c) / |Q|
    dq^c = dS^c k / (sqrt(d) tau),   dk = sum_c (dS^c)^T q^c / (sqrt(d) tau),   dv = sum_c (P^c)^T dO / |Q|

delta^c[i] is dO[i] . w^c[i] O^c[i] for the row softmax, and the mean of these over the head for the matrix softmax. O
is the mean of w^c O^c over the |Q| query kinds in use.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import LOG2E, cdiv
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.class_attention.backward_keys import key_gradients
from rada_fast.kernels.class_attention.backward_queries import image_query_gradient, query_gradients
from rada_fast.kernels.class_attention.forward import Attended
from rada_fast.kernels.class_attention.tiles import Tile, piece_columns, products_of, splits_head, tile_of
from rada_fast.kernels.rational_projections import ProjectionBuffers


@Kernel
def class_attention_backward_kernel(
    q_image,
    q_text,
    q_rational,
    keys,
    values,
    dattended,
    attended_image,
    logsums,
    image_logsums,
    totals,
    deltas,
    dkeys,
    dvalues,
    dq_image,
    dq_text,
    dq_rational,
    image_pairs,
    dattended_sum,
    batch,
    classes,
    tiles,
    query_tiles,
    images_per_text,
    scale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a tile of keys over all queries, or dq of a tile of queries over all keys.

    Axis 0 of the grid: tile of keys, group of output columns, head, image; then the same with tiles of queries; then
    head and image of the image query. Its programs are the shortest, so they come last: a processor that has finished
    its other programs waits the least for them. Each program computes what it needs, so none waits for another.

    tiles, query_tiles: the numbers of tiles of keys and of queries; query_tiles is 0 with the image query alone.
    scale: log2(e) / (sqrt(d) tau), because scores are in base 2; share: 1/|Q|.
    TRANSPOSED: whether programs that own queries compute scores as (keys, queries).
    BLOCK_M: the keys or queries of a tile. BLOCK_N: those that a program goes through at once. The two change places
        in programs that own queries and are TRANSPOSED.
    """
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    program, key_programs = tl.program_id(0), batch * tiles * (groups * (D // HEAD))
    query_programs = batch * query_tiles * (groups * (D // HEAD))
    if program < key_programs:
        key_gradients(
            program, q_image, q_text, q_rational, keys, values, dattended, attended_image, logsums, image_logsums,
            totals, deltas, dkeys, dvalues, image_pairs, dattended_sum, batch, classes, tiles, images_per_text, scale,
            share, D, HEAD, HEAD_VECTOR, CHUNKS, SPLIT_HEAD, BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_C, BLOCK_I, BLOCK_S,
            PRECISION,
        )  # fmt: skip
    elif program < key_programs + query_programs:
        query_gradients(
            program - key_programs, q_text, q_rational, keys, values, dattended, logsums, totals, deltas, dq_text,
            dq_rational, batch, classes, query_tiles, images_per_text, scale, share, D, HEAD, CHUNKS, SPLIT_HEAD,
            TRANSPOSED, BLOCK_N if TRANSPOSED else BLOCK_M, BLOCK_M if TRANSPOSED else BLOCK_N, BLOCK_D, BLOCK_C,
            BLOCK_S, PRECISION,
        )  # fmt: skip
    elif q_image is not None:
        image_query_gradient(
            program - key_programs - query_programs, q_image, keys, values, dattended, attended_image, image_logsums,
            dq_image, batch, classes, scale, share, D, HEAD, HEAD_VECTOR, BLOCK_I,
        )  # fmt: skip


class _BackwardLaunch(NamedTuple):
    """Hold the launch, and how many tiles of keys and groups of output columns a head has."""

    launch: Launch
    tiles: int
    groups: int


@remembered
def _backward_launch(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    kinds: tuple[bool, bool, bool],
    images_per_text: int,
    chunks: int,
    temperature: float,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> _BackwardLaunch:
    """Return the launch.

    kinds: whether the text, the rational and the image query are in use. chunks: the parts of a head's deltas.
    """
    head = width // num_heads
    tile = tile or tile_of(dtype, classes, head, backward=True, precision=precision, target=target)
    products = products_of(dtype, head, precision, target)
    *in_tiles, has_image = kinds
    vector = triton.next_power_of_2(head)
    # TF32 products of float32 have the bits of the forward pass only where the keys are on the left as they are there:
    # with other bits, probabilities of scores of 1e4 would not add up to 1. Programs that own queries then turn their
    # tile. Tiles take half the queries and warps, because the accumulators of queries have as many rows. On Hopper the
    # products of heads that are wider than 64 are not made to agree, and those of others are bfloat16 products, which
    # need not be turned.
    transposed = dtype == torch.float32 and precision != "ieee" and not target.is_hopper
    strip, warps = tile.keys, tile.warps
    if transposed:
        strip, warps = max(16, tile.keys // 2), max(1, tile.warps // 2)
    # A program that owns keys has as many of them as one that owns queries has of those, unless tiles are turned.
    tiles, groups = cdiv(classes, tile.queries), cdiv(head, tile.columns)
    query_tiles = cdiv(classes, strip if transposed else tile.queries) if any(in_tiles) else 0
    launch = class_attention_backward_kernel.launch(
        (batch * num_heads * (groups * (tiles + query_tiles) + has_image),),
        batch=batch, classes=classes, tiles=tiles, query_tiles=query_tiles, images_per_text=images_per_text,
        scale=LOG2E / (math.sqrt(head) * temperature), share=1 / sum(kinds),
        D=width, HEAD=head, HEAD_VECTOR=vector, CHUNKS=chunks, SPLIT_HEAD=splits_head(dtype, head, tile, products),
        TRANSPOSED=transposed, BLOCK_M=tile.queries, BLOCK_N=strip, BLOCK_D=tile.columns,
        BLOCK_C=piece_columns(dtype, head),
        # The image query's two accumulators of 64 x 64 spill on Blackwell. A thread has four columns of a row as in the
        # forward pass, so that scores are added up in the same order.
        BLOCK_I=max(1, 128 * warps // vector, min(32, 4096 // vector)),
        BLOCK_S=max(256, min(512, triton.next_power_of_2(classes))),
        PRECISION=products,
        # Left alone, the assembler spills to fit another block of four warps into a multiprocessor.
        num_warps=warps, num_stages=tile.stages, maxnreg=255 if transposed or products == "bf16x6" else None,
    )  # fmt: skip
    return _BackwardLaunch(launch, tiles, groups)


def class_attention_backward(
    projections: ProjectionBuffers,
    attended: Attended,
    dattended: Tensor,
    deltas: Tensor,
    *,
    num_heads: int,
    temperature: float,
    matrix: bool,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> ProjectionBuffers:
    """Compute the gradients of every projection in one launch; q_text's is (B, K, D).

    dattended: dO, (B, K, D).
    deltas: see MaskedLogitsGradients. Only the matrix softmax may have more than one chunk in a head.
    """
    keys, values = projections.keys, projections.values
    batch, classes, width = keys.shape
    text, rational, image = projections.q_text, projections.q_rational, projections.q_image
    gradients = ProjectionBuffers(
        keys=torch.empty_like(keys),
        values=torch.empty_like(keys),
        q_rational=None if rational is None else torch.empty_like(keys),
        q_text=None if text is None else torch.empty_like(keys),
        q_image=None if image is None else torch.empty_like(image),
    )
    if batch == 0:
        return gradients
    kinds = (text is not None, rational is not None, image is not None)
    launch, tiles, groups = _backward_launch(
        batch, classes, width, num_heads, kinds, batch // (text.shape[0] if text is not None else 1),
        deltas.shape[1] // num_heads, temperature, keys.dtype, precision, target_of(keys.device), tile,
    )  # fmt: skip
    float32 = {"dtype": torch.float32, "device": keys.device}
    launch(
        q_image=image, q_text=text, q_rational=rational, keys=keys, values=values, dattended=dattended,
        attended_image=attended.image, logsums=attended.logsums, image_logsums=attended.image_logsums,
        totals=attended.totals if matrix else None, deltas=deltas,
        dkeys=gradients.keys, dvalues=gradients.values, dq_image=gradients.q_image, dq_text=gradients.q_text,
        dq_rational=gradients.q_rational,
        image_pairs=None if image is None else torch.empty((batch, num_heads, groups, classes, 4), **float32),
        dattended_sum=None if image is None else torch.empty((batch, tiles, width), **float32),
    )  # fmt: skip
    return gradients
