"""Gradients of the queries of the attention over classes; backward.py holds the equations and the kernel."""

import triton
import triton.language as tl

from rada_fast.kernels._common import arange_by_fours, operand, product_of, store_column_sums, transposed
from rada_fast.kernels.class_attention.deltas import head_statistics, strided_sums
from rada_fast.kernels.class_attention.scores import LN2, program_place, split_head_scores, tile_place


@triton.jit
def _query_statistics(
    logsums,
    totals,
    deltas,
    b,
    head,
    i,
    valid,
    batch,
    classes,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Return the two numbers of the log2-sums and the deltas of a tile of queries, each with an axis for the keys.

    totals is None for the row softmax. The maxima of rows beyond the last class are infinite, so their P is 0.
    """
    key_axis: tl.constexpr = 0 if TRANSPOSED else 1
    if totals is not None:
        maximum, log_sum, mean = head_statistics(totals, deltas, b, head, batch, classes, KIND, HEADS, CHUNKS, BLOCK_S)
        valid = tl.expand_dims(valid, key_axis)
        maximum = tl.where(valid, maximum, float("inf"))
        if TRANSPOSED:
            return maximum, tl.where(valid, log_sum, 0.0), tl.where(valid, mean, 0.0)
        else:
            # One number for all rows takes fewer registers here, and more where the scores are transposed.
            return maximum, log_sum, mean
    else:
        rows = tl.full((), classes, tl.int64) * batch
        row = (KIND * HEADS + head) * rows + b * classes
        # The sums follow the maxima of both query kinds.
        return (
            tl.expand_dims(tl.load(logsums + row + i, mask=valid, other=float("inf")), key_axis),
            tl.expand_dims(tl.load(logsums + 2 * HEADS * rows + row + i, mask=valid, other=0.0), key_axis),
            tl.expand_dims(tl.load(deltas + row + i, mask=valid, other=0.0), key_axis),
        )


@triton.jit
def _query_gradient(
    queries,
    keys,
    k,
    dp,
    statistics,
    dq,
    i_valid,
    j_valid,
    scale,
    HEAD: tl.constexpr,
    SPLIT_HEAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return dq with the contribution of one tile of keys added.

    queries: the queries themselves, or pointers to their rows if the head is split.
    keys: pointers to rows, which are used only if the head is split. k: the tile of keys.
    dp: dP, (queries, keys), or (keys, queries) if TRANSPOSED. statistics: the queries' log-sums and deltas.
    j_valid: whether each key exists; None where rows beyond the last class repeat it and can be read.
    """
    maximum, log_sum, delta = statistics
    # Rows of zeros beyond the last class could have an infinite exponential. Their infinite maximum prevents it for
    # queries, and a mask for keys.
    if TRANSPOSED:
        scores = split_head_scores(keys, queries, j_valid, i_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
        if j_valid is not None:
            scores = tl.where(j_valid[:, None], scores, float("-inf"))
    else:
        if SPLIT_HEAD:
            scores = split_head_scores(queries, keys, i_valid, j_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
        else:
            scores = product_of(queries, transposed(k, PRECISION), None, PRECISION)
        scores = tl.where(j_valid[None, :], scores, float("-inf"))
    p = tl.exp2((scores * scale - maximum) - log_sum)
    ds = p * (dp - delta)
    if TRANSPOSED:
        ds = tl.trans(ds)
    return product_of(operand(ds.to(keys.dtype.scalar.element_ty), PRECISION), k, dq, PRECISION)


@triton.jit
def image_query_gradient(
    program,
    q_image,
    keys,
    values,
    dattended,
    attended_image,
    image_logsums,
    dq_image,
    batch,
    classes,
    scale,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Store dq of one image query and head, for which the sum of dO over the classes stands for dO."""
    heads: tl.constexpr = D // HEAD
    head, b = program % heads, (program // heads).to(tl.int64)
    first = b * classes
    column = head * HEAD
    c = arange_by_fours(HEAD_VECTOR)
    c_valid = c < HEAD
    row = b * D + column + c
    do_rows = strided_sums(dattended + first * D, column + c, c_valid, classes, D, BLOCK_I, HEAD_VECTOR)
    do = tl.sum(do_rows, 0)
    attended = tl.load(attended_image + row, mask=c_valid, other=0.0)
    q = tl.load(q_image + row, mask=c_valid, other=0.0)
    maximum = tl.load(image_logsums + b * heads + head)
    log_sum = tl.load(image_logsums + (batch + b) * heads + head)
    # The dS of a row add up to 0, so one key may be subtracted from all. Where keys have much in common, less is left
    # to be rounded.
    some_key = tl.load(keys + first * D + column + c, mask=c_valid, other=0.0).to(tl.float32)
    dq = tl.zeros((BLOCK_I, HEAD_VECTOR), tl.float32)
    for start in range(0, classes, 2 * BLOCK_I):
        # The loads of two blocks of keys are under way together.
        for block in tl.static_range(2):
            j = start + block * BLOCK_I + tl.arange(0, BLOCK_I)
            j_valid = j < classes
            offsets = (first + j)[:, None] * D + (column + c)[None, :]
            valid = j_valid[:, None] & c_valid[None, :]
            k = tl.load(keys + offsets, mask=valid, other=0.0).to(tl.float32)
            scores = tl.where(j_valid, tl.sum(k * q[None, :], 1), float("-inf"))
            p = tl.exp2((scores * scale - maximum) - log_sum)
            v = tl.load(values + offsets, mask=valid, other=0.0).to(tl.float32)
            # dO . v - delta, whose two terms may be almost equal
            ds = p * tl.sum((v - attended[None, :]) * do[None, :], 1)
            dq += ds[:, None] * (k - some_key[None, :])
    store_column_sums(dq_image + row, tl.sum(dq, 0) * (scale * LN2 * share), c_valid, BLOCK_I, HEAD_VECTOR)


@triton.jit
def query_gradients(
    program,
    q_text,
    q_rational,
    keys,
    values,
    dattended,
    logsums,
    totals,
    deltas,
    dq_text,
    dq_rational,
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
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq of a tile of text and rational queries over all keys.

    TRANSPOSED: whether scores are computed as (keys, queries), for a head that is read in pieces.
    """
    HAS_TEXT: tl.constexpr = q_text is not None
    HAS_RATIONAL: tl.constexpr = q_rational is not None
    # Keys beyond the last class are masked, or they are the last class again. On sm_80 and sm_90 the mask spills for
    # narrow heads, and the second reading for heads of 64.
    REPEAT_LAST: tl.constexpr = TRANSPOSED and HEAD < 64
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    dscale = scale * LN2 * share
    tile, group, head, b = program_place(program, tiles, groups, heads)
    column = head * HEAD
    first = b * classes
    i, i_valid, c, c_valid, out_columns = tile_place(tile, group, column, classes, HEAD, BLOCK_Q, BLOCK_D)
    valid = i_valid[:, None] & c_valid[None, :]
    do_rows = dattended + (first + i) * D + column
    if not SPLIT_HEAD:
        do = operand(tl.load(do_rows[:, None] + c[None, :], mask=valid, other=0.0), PRECISION)
    if HAS_TEXT:
        text = q_text + ((b // images_per_text) * classes + i) * D + column
        if not SPLIT_HEAD:
            text = operand(tl.load(text[:, None] + c[None, :], mask=valid, other=0.0), PRECISION)
        text_statistics = _query_statistics(
            logsums, totals, deltas, b, head, i, i_valid, batch, classes, 0, heads, CHUNKS, BLOCK_Q, BLOCK_S,
            TRANSPOSED,
        )  # fmt: skip
    if HAS_RATIONAL:
        rational = q_rational + (first + i) * D + column
        if not SPLIT_HEAD:
            rational = operand(tl.load(rational[:, None] + c[None, :], mask=valid, other=0.0), PRECISION)
        rational_statistics = _query_statistics(
            logsums, totals, deltas, b, head, i, i_valid, batch, classes, 1, heads, CHUNKS, BLOCK_Q, BLOCK_S,
            TRANSPOSED,
        )  # fmt: skip
    dq_text_tile = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    dq_rational_tile = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, classes, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        j_valid = j < classes
        source_row = first + j
        if REPEAT_LAST:
            source_row = first + tl.minimum(j, classes - 1)
        key_rows = keys + source_row * D + column
        value_rows = values + source_row * D + column
        k = tl.load(
            keys + (first + j)[:, None] * D + out_columns[None, :],
            mask=j_valid[:, None] & c_valid[None, :],
            other=0.0,
        )
        k = operand(k, PRECISION)
        if TRANSPOSED:
            dp = split_head_scores(
                value_rows, do_rows, None if REPEAT_LAST else j_valid, i_valid,
                HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION,
            )  # fmt: skip
        elif SPLIT_HEAD:
            dp = split_head_scores(do_rows, value_rows, i_valid, j_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
        else:
            v = tl.load(value_rows[None, :] + c[:, None], mask=j_valid[None, :] & c_valid[:, None], other=0.0)
            dp = product_of(do, operand(v, PRECISION), None, PRECISION)
        # Keys beyond the last are rows of zeros, so their dS adds nothing.
        if HAS_TEXT:
            dq_text_tile = _query_gradient(
                text, key_rows, k, dp, text_statistics, dq_text_tile, i_valid,
                None if REPEAT_LAST else j_valid, scale,
                HEAD, SPLIT_HEAD, TRANSPOSED, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
            )  # fmt: skip
        if HAS_RATIONAL:
            dq_rational_tile = _query_gradient(
                rational, key_rows, k, dp, rational_statistics, dq_rational_tile, i_valid,
                None if REPEAT_LAST else j_valid, scale,
                HEAD, SPLIT_HEAD, TRANSPOSED, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION,
            )  # fmt: skip
    offsets = (first + i)[:, None] * D + out_columns[None, :]
    if HAS_TEXT:
        tl.store(dq_text + offsets, (dq_text_tile * dscale).to(dq_text.dtype.element_ty), mask=valid)
    if HAS_RATIONAL:
        tl.store(dq_rational + offsets, (dq_rational_tile * dscale).to(dq_rational.dtype.element_ty), mask=valid)
