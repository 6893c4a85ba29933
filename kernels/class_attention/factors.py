"""Compute the factors that turn rows normalised by themselves into the matrix softmax of a whole head."""

import triton
import triton.language as tl


@triton.jit
def store_factors(logsums, factors, totals, kind_and_head, b, batch, classes, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the factors w[i] = K exp2(logsum[i] - log-sum of the head's matrix) of a head and image, and that log-sum
    minus log2 K.

    A log-sum is two numbers: the largest score, and the log2 of the sum of the exponentials of the scores less it. The
    log-sums of the rows come from other programs.

    logsums, factors, totals: those of Attended.
    kind_and_head: the place of the query kind and head among those of both kinds, of which there are HEADS.
    """
    row = (kind_and_head * batch + b) * classes
    maxima, sums = logsums + row, logsums + HEADS * batch * tl.full((), classes, tl.int64) + row
    # -1e38 takes the place of minus infinity, because the difference of two infinities would be NaN.
    running_max = tl.full((BLOCK,), -1e38, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        running_max = tl.maximum(running_max, tl.load(maxima + i, mask=i < classes, other=-1e38, cache_modifier=".cg"))
    largest = tl.max(running_max, 0)
    running_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        maximum = tl.load(maxima + i, mask=i < classes, other=float("-inf"), cache_modifier=".cg")
        log_sum = tl.load(sums + i, mask=i < classes, other=0.0, cache_modifier=".cg")
        running_sum += tl.exp2((maximum - largest) + log_sum)
    total = tl.log2(tl.sum(running_sum, 0) / classes)
    place = kind_and_head * batch + b
    tl.store(totals + place, largest)
    tl.store(totals + HEADS * batch + place, total)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        maximum = tl.load(maxima + i, mask=i < classes, other=float("-inf"), cache_modifier=".cg")
        log_sum = tl.load(sums + i, mask=i < classes, other=0.0, cache_modifier=".cg")
        tl.store(factors + row + i, tl.exp2((maximum - largest) + (log_sum - total)), mask=i < classes)
