"""Gradients of the keys and values of the attention over classes; backward.py holds the equations and the launcher."""

import triton
import triton.language as tl

from rada_fast.kernels._common import product
from rada_fast.kernels._launch import Kernel
from rada_fast.kernels.class_attention.deltas import head_statistics
from rada_fast.kernels.class_attention.scores import LN2, program_place, split_head_scores, tile_place


@triton.jit
def _key_gradients(
    query_rows,
    keys,
    dp,
    maxima,
    logsums,
    deltas,
    head_statistics,
    p_sum,
    dk,
    column,
    out_columns,
    i,
    i_valid,
    c_valid,
    scale,
    HEAD: tl.constexpr,
    MATRIX: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return (p_sum, dk) with the contribution of one tile of queries of one kind added.

    p_sum: the sum of the probabilities P^c over the query kinds so far, (keys, queries).
    dk: the sum of (dS^c)^T q^c so far, without its scale; backward.py has the equations.
    dp: dP, (keys, queries).
    query_rows: pointers to rows of the whole width.
    keys: the keys k themselves, or pointers to their rows if the head is split.
    maxima, logsums, deltas: pointers to the two numbers of the log-sums, and to the deltas delta^c, of this kind, head
        and image.
    """
    q = tl.load(query_rows[:, None] + out_columns[None, :], mask=i_valid[:, None] & c_valid[None, :], other=0.0)
    if SPLIT_HEAD:
        scores = split_head_scores(keys, query_rows + column, None, i_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
    else:
        scores = product(keys, tl.trans(q), None, PRECISION)
    if MATRIX:
        head_maximum, head_log_sum, mean_delta = head_statistics
        maximum = tl.where(i_valid, head_maximum, float("inf"))
        log_sum = tl.where(i_valid, head_log_sum, 0.0)
        delta = tl.where(i_valid, mean_delta, 0.0)
    else:
        maximum = tl.load(maxima + i, mask=i_valid, other=float("inf"))
        log_sum = tl.load(logsums + i, mask=i_valid, other=0.0)
        delta = tl.load(deltas + i, mask=i_valid, other=0.0)
    p = tl.exp2((scores * scale - maximum[None, :]) - log_sum[None, :])
    ds = p * (dp - delta[None, :])
    return p_sum + p, product(ds.to(q.dtype), q, dk, PRECISION)


@Kernel
def class_attention_backward_keys_kernel(
    q_image,
    q_text,
    q_rational,
    keys,
    values,
    dattended,
    logsums,
    totals,
    deltas,
    image_pairs,
    dattended_sum,
    dkeys,
    dvalues,
    batch,
    classes,
    tiles,
    images_per_text,
    scale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a tile of keys over all queries.

    Scores are computed as (keys, queries), so P never has to be transposed.
    """
    HAS_TEXT: tl.constexpr = q_text is not None
    HAS_RATIONAL: tl.constexpr = q_rational is not None
    MATRIX: tl.constexpr = totals is not None
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    dscale = scale * LN2 * share
    tile, group, head, b = program_place(tiles, groups, heads)
    column = head * HEAD
    first = b * classes
    rows = tl.full((), classes, tl.int64) * batch
    j, j_valid, c, c_valid, out_columns = tile_place(tile, group, column, classes, HEAD, BLOCK_K, BLOCK_D)
    valid = j_valid[:, None] & c_valid[None, :]
    # Rows beyond the last class read the last class again. With rows of zeros the exponential could be infinite, and a
    # mask of the scores would take registers that heads of 64 do not have to spare.
    source_row = first + tl.minimum(j, classes - 1)
    k = keys + source_row * D + column
    v = values + source_row * D + column
    if not SPLIT_HEAD:
        k = tl.load(k[:, None] + c[None, :], mask=c_valid[None, :], other=0.0)
        v = tl.load(v[:, None] + c[None, :], mask=c_valid[None, :], other=0.0)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if HAS_TEXT or HAS_RATIONAL:
        text_row, rational_row = head * rows + first, (heads + head) * rows + first
        # The sums follow the maxima of both query kinds.
        after_maxima = 2 * heads * rows
        text_statistics = (0.0, 0.0, 0.0)
        rational_statistics = (0.0, 0.0, 0.0)
        if MATRIX and HAS_TEXT:
            text_statistics = head_statistics(totals, deltas, b, head, batch, classes, 0, heads, CHUNKS, BLOCK_S)
        if MATRIX and HAS_RATIONAL:
            rational_statistics = head_statistics(totals, deltas, b, head, batch, classes, 1, heads, CHUNKS, BLOCK_S)
        for start in range(0, classes, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            i_valid = i < classes
            do_rows = dattended + (first + i) * D + column
            do = tl.load(
                dattended + (first + i)[:, None] * D + out_columns[None, :],
                mask=i_valid[:, None] & c_valid[None, :],
                other=0.0,
            )
            if SPLIT_HEAD:
                dp = split_head_scores(v, do_rows, None, i_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
            else:
                dp = product(v, tl.trans(do), None, PRECISION)
            p_sum = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
            if HAS_TEXT:
                p_sum, dk = _key_gradients(
                    q_text + ((b // images_per_text) * classes + i) * D, k, dp,
                    logsums + text_row, logsums + after_maxima + text_row, deltas + text_row, text_statistics,
                    p_sum, dk,
                    column, out_columns, i, i_valid, c_valid, scale,
                    HEAD, MATRIX, SPLIT_HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
                )  # fmt: skip
            if HAS_RATIONAL:
                p_sum, dk = _key_gradients(
                    q_rational + (first + i) * D, k, dp,
                    logsums + rational_row, logsums + after_maxima + rational_row, deltas + rational_row,
                    rational_statistics, p_sum, dk,
                    column, out_columns, i, i_valid, c_valid, scale,
                    HEAD, MATRIX, SPLIT_HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
                )  # fmt: skip
            dv = product(p_sum.to(do.dtype), do, dv, PRECISION)
    dk *= dscale
    dv *= share
    if q_image is not None:
        pair_offsets = ((b * heads + head) * classes + j) * 4
        p = tl.load(image_pairs + pair_offsets, mask=j_valid, other=0.0)
        ds = tl.load(image_pairs + pair_offsets + 1, mask=j_valid, other=0.0)
        dv += p[:, None] * tl.load(dattended_sum + b * D + out_columns, mask=c_valid, other=0.0)[None, :]
        dk += ds[:, None] * tl.load(q_image + b * D + out_columns, mask=c_valid, other=0.0)[None, :]
    offsets = (first + j)[:, None] * D + out_columns[None, :]
    tl.store(dkeys + offsets, dk.to(dkeys.dtype.element_ty), mask=valid)
    tl.store(dvalues + offsets, dv.to(dvalues.dtype.element_ty), mask=valid)
