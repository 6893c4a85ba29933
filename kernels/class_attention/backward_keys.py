"""Gradients of the keys and values of the attention over classes; backward.py holds the equations and the kernel."""

import triton
import triton.language as tl

from rada_fast.kernels._common import arange_by_fours, operand, product_of, store_column_sums, transposed
from rada_fast.kernels.class_attention.deltas import head_statistics, strided_sums
from rada_fast.kernels.class_attention.scores import LN2, program_place, split_head_scores, tile_place


@triton.jit
def _load_rows(matrix, i, columns, i_valid, c_valid, D: tl.constexpr):
    """Load some columns of rows of a matrix of D columns."""
    offsets = i[:, None] * D + columns[None, :]
    return tl.load(matrix + offsets, mask=i_valid[:, None] & c_valid[None, :], other=0.0)


@triton.jit
def _key_gradients(
    queries,
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
    D: tl.constexpr,
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
    queries: a pointer to the first row, of the whole width.
    keys: the keys k themselves, or pointers to their rows if the head is split.
    maxima, logsums, deltas: pointers to the two numbers of the log-sums, and to the deltas delta^c, of this kind, head
        and image.
    """
    q = operand(_load_rows(queries, i, out_columns, i_valid, c_valid, D), PRECISION)
    if SPLIT_HEAD:
        scores = split_head_scores(
            keys, queries + column + i * D, None, i_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION
        )
    else:
        # They have the bits of the forward pass, where the queries are on the left.
        scores = product_of(keys, transposed(q, PRECISION), None, PRECISION, True)
    if MATRIX:
        head_maximum, head_log_sum, mean_delta = head_statistics
        maximum = tl.where(i_valid, head_maximum, float("inf"))
        # The probabilities of rows beyond the last class are 0 whatever these are.
        log_sum = tl.zeros((BLOCK_Q,), tl.float32) + head_log_sum
        delta = tl.zeros((BLOCK_Q,), tl.float32) + mean_delta
    else:
        maximum = tl.load(maxima + i, mask=i_valid, other=float("inf"))
        log_sum = tl.load(logsums + i, mask=i_valid, other=0.0)
        delta = tl.load(deltas + i, mask=i_valid, other=0.0)
    p = tl.exp2((scores * scale - maximum[None, :]) - log_sum[None, :])
    ds = p * (dp - delta[None, :])
    ds = operand(ds.to(queries.dtype.element_ty), PRECISION)
    return p_sum + p, product_of(ds, q, dk, PRECISION)


@triton.jit
def _store_image_query(
    q_image,
    keys,
    values,
    dattended,
    attended_image,
    image_logsums,
    pairs,
    dattended_sum,
    tile,
    group,
    b,
    head,
    batch,
    classes,
    scale,
    dscale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Store for each key of a tile the pair (P, dS) of the image query, and the sum of dO over the classes.

    They are read again after the loop over the queries, which has no registers to spare for them. The scores are added
    up as in the forward pass.

    pairs: a pointer to the pairs of this program's image, head and group of columns.
    dattended_sum: a pointer to the sums of its tile and image, of which it stores those of its group.
    """
    heads: tl.constexpr = D // HEAD
    first = b * classes
    c = arange_by_fours(HEAD_VECTOR)
    c_valid = c < HEAD
    columns = head * HEAD + c
    sums = strided_sums(dattended + first * D, columns, c_valid, classes, D, BLOCK_I, HEAD_VECTOR)
    attended = tl.load(attended_image + b * D + columns, mask=c_valid, other=0.0)
    do = tl.sum(sums, 0)
    in_group = c_valid & (c // BLOCK_D == group)
    store_column_sums(dattended_sum + columns, do, in_group, BLOCK_I, HEAD_VECTOR)
    q = tl.load(q_image + b * D + columns, mask=c_valid, other=0.0)
    maximum = tl.load(image_logsums + b * heads + head)
    log_sum = tl.load(image_logsums + (batch + b) * heads + head)
    end = tl.minimum((tile + 1) * BLOCK_K, classes)
    for start in range(tile * BLOCK_K, end, BLOCK_I):
        j = start + tl.arange(0, BLOCK_I)
        j_valid = j < end
        valid = j_valid[:, None] & c_valid[None, :]
        offsets = (first + j)[:, None] * D + columns[None, :]
        v = tl.load(values + offsets, mask=valid, other=0.0).to(tl.float32)
        # dO . v - delta, whose two terms may be almost equal
        differences = tl.sum((v - attended[None, :]) * do[None, :], 1)
        k = tl.load(keys + offsets, mask=valid, other=0.0).to(tl.float32)
        scores = tl.where(j_valid, tl.sum(k * q[None, :], 1), float("-inf"))
        p = tl.exp2((scores * scale - maximum) - log_sum)
        # P and dS of a key alternate in four columns, which are those of one thread in the tile's own layout.
        pair = tl.where((c % 2 == 0)[None, :], (p * share)[:, None], (p * differences * dscale)[:, None])
        tl.store(pairs + j[:, None] * 4 + c[None, :], pair, mask=j_valid[:, None] & (c < 4)[None, :])
    tl.debug_barrier()


@triton.jit
def key_gradients(
    program,
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
    image_pairs,
    dattended_sum,
    batch,
    classes,
    tiles,
    images_per_text,
    scale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk and dv of a tile of keys over all queries.

    Scores are computed as (keys, queries), so P never has to be transposed.
    """
    HAS_TEXT: tl.constexpr = q_text is not None
    HAS_RATIONAL: tl.constexpr = q_rational is not None
    HAS_IMAGE: tl.constexpr = q_image is not None
    MATRIX: tl.constexpr = totals is not None
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    dscale = scale * LN2 * share
    tile, group, head, b = program_place(program, tiles, groups, heads)
    column = head * HEAD
    first = b * classes
    rows = tl.full((), classes, tl.int64) * batch
    j, j_valid, c, c_valid, out_columns = tile_place(tile, group, column, classes, HEAD, BLOCK_K, BLOCK_D)
    if HAS_IMAGE:
        image_pairs += ((b * heads + head) * groups + group) * classes * 4
        dattended_sum += (b * tiles + tile) * D
        _store_image_query(
            q_image, keys, values, dattended, attended_image, image_logsums, image_pairs, dattended_sum, tile, group,
            b, head, batch, classes, scale, dscale, share, D, HEAD, HEAD_VECTOR, BLOCK_K, BLOCK_D, BLOCK_I,
        )  # fmt: skip
    valid = j_valid[:, None] & c_valid[None, :]
    # Rows beyond the last class read the last class again. With rows of zeros the exponential could be infinite, and a
    # mask of the scores would take registers that heads of 64 do not have to spare.
    source_row = tl.minimum(j, classes - 1)
    k = keys + (first * D + column) + source_row * D
    v = values + (first * D + column) + source_row * D
    if not SPLIT_HEAD:
        k = operand(tl.load(k[:, None] + c[None, :], mask=c_valid[None, :], other=0.0), PRECISION)
        v = operand(tl.load(v[:, None] + c[None, :], mask=c_valid[None, :], other=0.0), PRECISION)
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
            do_rows = dattended + (first * D + column) + i * D
            if SPLIT_HEAD:
                dp = split_head_scores(v, do_rows, None, i_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
            else:
                do = operand(_load_rows(dattended + first * D, i, out_columns, i_valid, c_valid, D), PRECISION)
                dp = product_of(v, transposed(do, PRECISION), None, PRECISION)
            p_sum = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
            if HAS_TEXT:
                p_sum, dk = _key_gradients(
                    q_text + (b // images_per_text) * classes * D, k, dp,
                    logsums + text_row, logsums + after_maxima + text_row, deltas + text_row, text_statistics,
                    p_sum, dk,
                    column, out_columns, i, i_valid, c_valid, scale,
                    D, HEAD, MATRIX, SPLIT_HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
                )  # fmt: skip
            if HAS_RATIONAL:
                p_sum, dk = _key_gradients(
                    q_rational + first * D, k, dp,
                    logsums + rational_row, logsums + after_maxima + rational_row, deltas + rational_row,
                    rational_statistics, p_sum, dk,
                    column, out_columns, i, i_valid, c_valid, scale,
                    D, HEAD, MATRIX, SPLIT_HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
                )  # fmt: skip
            if SPLIT_HEAD:
                # Loaded any earlier, it would take registers that the scores need.
                do = operand(_load_rows(dattended + first * D, i, out_columns, i_valid, c_valid, D), PRECISION)
            dv = product_of(operand(p_sum.to(dattended.dtype.element_ty), PRECISION), do, dv, PRECISION)
    # One after the other they take fewer registers.
    offsets = j[:, None] * D + out_columns[None, :]
    dk *= dscale
    if HAS_IMAGE:
        ds = tl.load(image_pairs + j * 4 + 1, mask=j_valid, other=0.0)
        dk += ds[:, None] * tl.load(q_image + b * D + out_columns, mask=c_valid, other=0.0)[None, :]
    tl.store(dkeys + first * D + offsets, dk.to(dkeys.dtype.element_ty), mask=valid)
    dv *= share
    if HAS_IMAGE:
        p = tl.load(image_pairs + j * 4, mask=j_valid, other=0.0)
        dv += p[:, None] * tl.load(dattended_sum + out_columns, mask=c_valid, other=0.0)[None, :]
    tl.store(dvalues + first * D + offsets, dv.to(dvalues.dtype.element_ty), mask=valid)
