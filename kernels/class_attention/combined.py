"""Combine the attention's results of all query kinds into O, once all programs of a head have stored theirs."""

import triton
import triton.language as tl

from rada_fast.kernels._common import arange_by_fours


@triton.jit
def log_sum_of_head(logsums, kind_and_head, b, batch, classes, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the two numbers of the log-sum of a head's whole matrix of scores, of which log2 K is subtracted.

    A log-sum is two numbers: the largest score, and the log2 of the sum of the exponentials of the scores less it.

    logsums: those of Attended. kind_and_head: the place of the query kind and head among those of both kinds, of which
    there are HEADS.
    """
    row = (kind_and_head * batch + b) * classes
    maxima, sums = logsums + row, logsums + HEADS * batch * tl.full((), classes, tl.int64) + row
    # -1e38 takes the place of minus infinity, because the difference of two infinities would be NaN.
    running_max = tl.full((BLOCK,), -1e38, tl.float32)
    running_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        maximum = tl.load(maxima + i, mask=i < classes, other=-1e38, cache_modifier=".cg")
        log_sum = tl.load(sums + i, mask=i < classes, other=float("-inf"), cache_modifier=".cg")
        new_max = tl.maximum(running_max, maximum)
        running_sum = running_sum * tl.exp2(running_max - new_max) + tl.exp2((maximum - new_max) + log_sum)
        running_max = new_max
    largest = tl.max(running_max, 0)
    return largest, tl.log2(tl.sum(running_sum * tl.exp2(running_max - largest), 0) / classes)


@triton.jit
def store_total(totals, log_sum, kind_and_head, b, batch, HEADS: tl.constexpr):
    """Store the two numbers of a head's log-sum, which log_sum_of_head has computed."""
    largest, total = log_sum
    tl.store(totals + kind_and_head * batch + b, largest)
    tl.store(totals + (HEADS + kind_and_head) * batch + b, total)


@triton.jit
def _weighted_rows(
    attended,
    logsums,
    factors,
    log_sum,
    kind_and_head,
    b,
    batch,
    classes,
    i,
    i_valid,
    offsets,
    valid,
    HEADS: tl.constexpr,
):
    """Return the rows i of one kind's O^c in float32, under the matrix softmax times their factors w, which it stores.

    log_sum: what log_sum_of_head has returned. offsets: the places of the elements, from the image's first row on.
    """
    output = tl.load(attended + offsets, mask=valid, other=0.0, cache_modifier=".cg").to(tl.float32)
    if factors is not None:
        largest, total = log_sum
        row = (kind_and_head * batch + b) * classes + i
        sums = logsums + HEADS * batch * tl.full((), classes, tl.int64)
        maximum = tl.load(logsums + row, mask=i_valid, other=float("-inf"), cache_modifier=".cg")
        row_sum = tl.load(sums + row, mask=i_valid, other=0.0, cache_modifier=".cg")
        w = tl.exp2((maximum - largest) + (row_sum - total))
        tl.store(factors + row, w, mask=i_valid)
        output *= w[:, None]
    return output


@triton.jit
def store_combined(
    attended,
    combined,
    logsums,
    factors,
    totals,
    b,
    head,
    batch,
    classes,
    share,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store O = (1/|Q|) sum_c w^c O^c of a head and image, and under the matrix softmax what its factors w come from.

    Other programs have stored the results that it reads.

    attended: the results O^c of the text, the rational and the image query, each None where the kind is not in use.
    factors: None for the row softmax, whose factors are 1. share: 1/|Q|.
    BLOCK_S: the log-sums that are read at once; BLOCK_R: the rows.
    """
    heads: tl.constexpr = D // HEAD
    text, rational, image = attended
    text_log_sum = (0.0, 0.0)
    rational_log_sum = (0.0, 0.0)
    if factors is not None:
        if text is not None:
            text_log_sum = log_sum_of_head(logsums, head, b, batch, classes, 2 * heads, BLOCK_S)
            store_total(totals, text_log_sum, head, b, batch, 2 * heads)
        if rational is not None:
            rational_log_sum = log_sum_of_head(logsums, heads + head, b, batch, classes, 2 * heads, BLOCK_S)
            store_total(totals, rational_log_sum, heads + head, b, batch, 2 * heads)
    c = arange_by_fours(HEAD_VECTOR)
    c_valid = c < HEAD
    column = head * HEAD + c
    first = b * classes * D
    if image is not None:
        image_output = tl.load(image + b * D + column, mask=c_valid, other=0.0, cache_modifier=".cg")
    for start in range(0, classes, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        i_valid = i < classes
        offsets = i[:, None] * D + column[None, :]
        valid = i_valid[:, None] & c_valid[None, :]
        output = tl.zeros((BLOCK_R, HEAD_VECTOR), tl.float32)
        if text is not None:
            output += _weighted_rows(
                text + first, logsums, factors, text_log_sum, head, b, batch, classes, i, i_valid, offsets, valid,
                2 * heads,
            )  # fmt: skip
        if rational is not None:
            output += _weighted_rows(
                rational + first, logsums, factors, rational_log_sum, heads + head, b, batch, classes, i, i_valid,
                offsets, valid, 2 * heads,
            )  # fmt: skip
        if image is not None:
            output += image_output[None, :]
        tl.store(combined + first + offsets, (output * share).to(combined.dtype.element_ty), mask=valid)
