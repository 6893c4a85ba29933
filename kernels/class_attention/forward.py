"""Forward pass of the attention over classes; the package's docstring has the equations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    LOG2E,
    arange_by_fours,
    cdiv,
    is_last_to_finish,
    operand,
    product_of,
    store_column_sums,
)
from rada_fast.kernels._launch import Kernel, Launch, remembered
from rada_fast.kernels._shared_memory import Target, target_of
from rada_fast.kernels.class_attention.combined import store_combined
from rada_fast.kernels.class_attention.scores import (
    program_place,
    query_scores,
    text_and_rational_scores,
    tile_place,
)
from rada_fast.kernels.class_attention.tiles import Tile, piece_columns, products_of, splits_head, tile_of
from rada_fast.kernels.rational_projections import ProjectionBuffers


@triton.jit
def _online_softmax_update(scores, scale, v, dtype: tl.constexpr, state, PRECISION: tl.constexpr):
    """Take one step of the online softmax by rows. state: (running_max, running_sum, accumulator).

    scores: before they are multiplied by scale. The product is fused with the difference, and so is not rounded.
    v: the values as operand returns them; dtype: their type in memory.
    """
    running_max, running_sum, accumulator = state
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_max[:, None])
    rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(p, 1)
    p = operand(p.to(dtype), PRECISION)
    accumulator = product_of(p, v, accumulator * rescale[:, None], PRECISION)
    return new_max, running_sum, accumulator


@triton.jit
def _store_attended(attended, maxima, logsums, state, offsets, valid, stores_logsum):
    """Store one kind's O^c, normalised by rows, and the two numbers of its log-sums.

    attended: a pointer to the image's first row; maxima, logsums: pointers to the two numbers of each row.
    """
    running_max, running_sum, accumulator = state
    accumulator = accumulator / running_sum[:, None]
    tl.store(attended + offsets, accumulator.to(attended.dtype.element_ty), mask=valid)
    tl.store(maxima, running_max, mask=stores_logsum)
    tl.store(logsums, tl.log2(running_sum), mask=stores_logsum)


@triton.jit
def _image_query(
    q_image,
    keys,
    values,
    attended_image,
    image_logsums,
    b,
    head,
    batch,
    classes,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Store O^image of one image and head, and its log-sum."""
    heads: tl.constexpr = D // HEAD
    first = b * classes
    column = head * HEAD
    c = arange_by_fours(HEAD_VECTOR)
    c_valid = c < HEAD
    q = tl.load(q_image + b * D + column + c, mask=c_valid, other=0.0)
    # Every row of the tile has a softmax of its own, so no value crosses warps before the end.
    # -1e38 takes the place of minus infinity, because the difference of two infinities would be NaN.
    running_max = tl.full((BLOCK_I,), -1e38, tl.float32)
    running_sum = tl.zeros((BLOCK_I,), tl.float32)
    accumulator = tl.zeros((BLOCK_I, HEAD_VECTOR), tl.float32)
    for start in range(0, classes, BLOCK_I):
        j = start + tl.arange(0, BLOCK_I)
        j_valid = j < classes
        offsets = (first + j)[:, None] * D + (column + c)[None, :]
        valid = j_valid[:, None] & c_valid[None, :]
        k = tl.load(keys + offsets, mask=valid, other=0.0).to(tl.float32)
        scores = tl.where(j_valid, tl.sum(k * q[None, :], 1), float("-inf"))
        new_max = tl.maximum(running_max, scores * scale)
        rescale = tl.exp2(running_max - new_max)
        p = tl.exp2(scores * scale - new_max)
        v = tl.load(values + offsets, mask=valid, other=0.0).to(tl.float32)
        running_sum = running_sum * rescale + p
        accumulator = accumulator * rescale[:, None] + p[:, None] * v
        running_max = new_max
    largest = tl.max(tl.broadcast_to(running_max[:, None], (BLOCK_I, HEAD_VECTOR)))
    rescale = tl.exp2(running_max - largest)
    total = tl.sum(tl.where((c == 0)[None, :], (running_sum * rescale)[:, None], 0.0))
    accumulator = accumulator * (rescale / total)[:, None]
    store_column_sums(attended_image + b * D + column + c, tl.sum(accumulator, 0), c_valid, BLOCK_I, HEAD_VECTOR)
    tl.store(image_logsums + b * heads + head, largest)
    tl.store(image_logsums + (batch + b) * heads + head, tl.log2(total))


@Kernel
def class_attention_forward_kernel(
    q_image,
    q_text,
    q_rational,
    keys,
    values,
    attended_image,
    attended_text,
    attended_rational,
    combined,
    logsums,
    image_logsums,
    factors,
    totals,
    counters,
    batch,
    classes,
    tiles,
    images_per_text,
    scale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute O^c of a tile of queries and a group of output columns, over all keys.

    Of the programs of a head and image, the last one to finish combines the results of all query kinds into O, for
    which it computes the factors of the matrix softmax.

    Axis 0 of the grid: query tile (the last one is the image query), group of output columns, head, image.
    """
    HAS_TEXT: tl.constexpr = q_text is not None
    HAS_RATIONAL: tl.constexpr = q_rational is not None
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    all_tiles = tiles
    if q_image is not None:
        all_tiles += 1
    tile, group, head, b = program_place(tl.program_id(0), all_tiles, groups, heads)
    column = head * HEAD
    first = b * classes
    if tile < tiles:
        i, i_valid, c, c_valid, out_columns = tile_place(tile, group, column, classes, HEAD, BLOCK_Q, BLOCK_D)
        if HAS_TEXT:
            text_rows = q_text + ((b // images_per_text) * classes * D + column) + i * D
            if not SPLIT_HEAD:
                text = tl.load(text_rows[:, None] + c[None, :], mask=i_valid[:, None] & c_valid[None, :], other=0.0)
                text = operand(text, PRECISION)
        if HAS_RATIONAL:
            rational_rows = q_rational + (first * D + column) + i * D
            if not SPLIT_HEAD:
                rational = tl.load(
                    rational_rows[:, None] + c[None, :], mask=i_valid[:, None] & c_valid[None, :], other=0.0
                )
                rational = operand(rational, PRECISION)
        no_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        no_sum = tl.zeros((BLOCK_Q,), tl.float32)
        no_output = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        text_state = (no_max, no_sum, no_output)
        rational_state = (no_max, no_sum, no_output)
        for start in range(0, classes, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            j_valid = j < classes
            v = tl.load(
                values + first * D + (j[:, None] * D + out_columns[None, :]),
                mask=j_valid[:, None] & c_valid[None, :],
                other=0.0,
            )
            v = operand(v, PRECISION)
            key_rows = keys + (first * D + column) + j * D
            if not SPLIT_HEAD:
                k = tl.load(key_rows[None, :] + c[:, None], mask=j_valid[None, :] & c_valid[:, None], other=0.0)
                k = operand(k, PRECISION)
            elif HAS_TEXT and HAS_RATIONAL:
                text_scores, rational_scores = text_and_rational_scores(
                    text_rows, rational_rows, key_rows, i_valid, j_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION
                )
            elif HAS_TEXT:
                text_scores = query_scores(
                    text_rows, key_rows, i_valid, j_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION
                )
            elif HAS_RATIONAL:
                rational_scores = query_scores(
                    rational_rows, key_rows, i_valid, j_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION
                )
            if HAS_TEXT:
                if not SPLIT_HEAD:
                    text_scores = product_of(text, k, None, PRECISION)
                scores = tl.where(j_valid[None, :], text_scores, float("-inf"))
                text_state = _online_softmax_update(scores, scale, v, values.dtype.element_ty, text_state, PRECISION)
            if HAS_RATIONAL:
                if not SPLIT_HEAD:
                    rational_scores = product_of(rational, k, None, PRECISION)
                scores = tl.where(j_valid[None, :], rational_scores, float("-inf"))
                rational_state = _online_softmax_update(
                    scores, scale, v, values.dtype.element_ty, rational_state, PRECISION
                )
        offsets = i[:, None] * D + out_columns[None, :]
        valid = i_valid[:, None] & c_valid[None, :]
        # The sums follow the maxima of both query kinds.
        rows = tl.full((), classes, tl.int64) * batch
        after_maxima = 2 * heads * rows
        # Every group of columns has the same log-sums; the first one stores them.
        stores_logsum = i < tl.where(group == 0, classes, 0)
        if HAS_TEXT:
            text_maxima = logsums + (head * rows + first) + i
            _store_attended(
                attended_text + first * D, text_maxima, text_maxima + after_maxima, text_state, offsets, valid,
                stores_logsum,
            )  # fmt: skip
        if HAS_RATIONAL:
            rational_maxima = logsums + ((heads + head) * rows + first) + i
            _store_attended(
                attended_rational + first * D, rational_maxima, rational_maxima + after_maxima, rational_state, offsets,
                valid, stores_logsum,
            )  # fmt: skip
    elif q_image is not None:
        if group == 0:
            _image_query(
                q_image, keys, values, attended_image, image_logsums, b, head, batch, classes, scale,
                D, HEAD, HEAD_VECTOR, BLOCK_I,
            )  # fmt: skip
    if is_last_to_finish(counters + b * heads + head, all_tiles * groups):
        store_combined(
            (attended_text, attended_rational, attended_image), combined, logsums, factors, totals, b, head, batch,
            classes, share, D, HEAD, HEAD_VECTOR, BLOCK_S, BLOCK_R,
        )  # fmt: skip


@dataclass
class Attended:
    """Hold the results of the attention, None where a query kind or the matrix softmax is not in use.

    text, rational: O^c, (B, K, D), normalised by rows; image: O^image, (B, D) float32.
    combined: O, (B, K, D), the mean over the query kinds of O^c times its factors.
    logsums: (2, 2, H, B, K) and image_logsums: (2, B, H), the log2 of the sums of exponentials, as two numbers: the
        largest score of each row, then the log2 of the sum over the scores less it. One number would round away what
        large scores differ in. The next axis is the query kind, text first.
    factors: (2, H, B, K), the rows' factors w of the matrix softmax.
    totals: (2, 2, H, B), the log2 of a head's sum less log2 K, as the same two numbers.
    """

    text: Tensor | None
    rational: Tensor | None
    image: Tensor | None
    combined: Tensor
    logsums: Tensor
    image_logsums: Tensor
    factors: Tensor | None
    totals: Tensor | None

    @property
    def kinds(self) -> int:
        """Return the number |Q| of query kinds in use."""
        return (self.text is not None) + (self.rational is not None) + (self.image is not None)


@remembered
def _forward_launch(
    batch: int,
    classes: int,
    width: int,
    num_heads: int,
    kinds: tuple[bool, bool, bool],
    images_per_text: int,
    images: int | None,
    temperature: float,
    dtype: torch.dtype,
    precision: str,
    target: Target,
    tile: Tile | None,
) -> Launch:
    """Return the launch. kinds: whether the text, the rational and the image query are in use."""
    head = width // num_heads
    tile = tile or tile_of(dtype, classes, head, images=images, precision=precision, target=target)
    *in_tiles, has_image = kinds
    tiles = cdiv(classes, tile.queries) if any(in_tiles) else 0
    programs = batch * num_heads * cdiv(head, tile.columns) * (tiles + has_image)
    vector = triton.next_power_of_2(head)
    products = products_of(dtype, head, precision, target)
    split = splits_head(dtype, head, tile, products)
    return class_attention_forward_kernel.launch(
        (programs,),
        batch=batch, classes=classes, tiles=tiles, images_per_text=images_per_text,
        scale=LOG2E / (math.sqrt(head) * temperature), share=1 / sum(kinds),
        D=width, HEAD=head, HEAD_VECTOR=vector, SPLIT_HEAD=split, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        BLOCK_D=tile.columns, BLOCK_C=piece_columns(dtype, head), BLOCK_I=max(1, min(64, 4096 // vector)),
        BLOCK_S=max(256, min(1024, triton.next_power_of_2(classes))),
        # In float32, 128 rows spill on Hopper, and 64 rows of heads of 128 on the A100 and on Blackwell.
        BLOCK_R=max(
            1,
            min(
                64 if classes <= 64 or dtype == torch.float32 else 128,
                (4096 if dtype == torch.float32 and vector <= 128 else 8192) // vector,
            ),
        ),
        PRECISION=products,
        # With one kind only four warps lie side by side (see text_and_rational_scores).
        num_warps=min(tile.warps, 4) if split and sum(in_tiles) < 2 else tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def class_attention_forward(
    projections: ProjectionBuffers,
    *,
    num_heads: int,
    temperature: float,
    matrix: bool,
    images: int | None = None,
    counters: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Attended:
    """Compute the attention of every query kind in use, and the mean over the kinds, in one launch.

    projections: as rational_projections_forward returns them. temperature: divides the scores, beside sqrt(d).
    images: the images of one episode, by which the tile is chosen; None stands for many.
    counters: (B H,) int32, zero; None lets PyTorch set some to zero, which is a launch of its own.
    """
    keys, values = projections.keys, projections.values
    batch, classes, width = keys.shape
    float32 = {"dtype": torch.float32, "device": keys.device}
    text, rational, image = projections.q_text, projections.q_rational, projections.q_image
    attended = Attended(
        text=None if text is None else torch.empty_like(keys),
        rational=None if rational is None else torch.empty_like(keys),
        image=None if image is None else torch.empty_like(image),
        combined=torch.empty_like(keys),
        logsums=torch.empty((2, 2, num_heads, batch, classes), **float32),
        image_logsums=torch.empty((2, batch, num_heads), **float32),
        factors=torch.empty((2, num_heads, batch, classes), **float32) if matrix else None,
        totals=torch.empty((2, 2, num_heads, batch), **float32) if matrix else None,
    )
    if batch == 0:
        return attended
    kinds = (text is not None, rational is not None, image is not None)
    if counters is None:
        counters = torch.zeros((batch * num_heads,), dtype=torch.int32, device=keys.device)
    launch = _forward_launch(
        batch, classes, width, num_heads, kinds, batch // (text.shape[0] if text is not None else 1), images,
        temperature, keys.dtype, precision, target_of(keys.device), tile,
    )  # fmt: skip
    launch(
        q_image=image, q_text=text, q_rational=rational, keys=keys, values=values,
        attended_image=attended.image, attended_text=attended.text, attended_rational=attended.rational,
        combined=attended.combined, logsums=attended.logsums, image_logsums=attended.image_logsums,
        factors=attended.factors, totals=attended.totals, counters=counters,
    )  # fmt: skip
    return attended
