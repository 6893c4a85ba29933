"""Add up what the programs of the backward pass need of a whole head: its mean delta, and rows of a matrix."""

import triton
import triton.language as tl


@triton.jit
def head_statistics(
    totals,
    deltas,
    b,
    head,
    batch,
    classes,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load a head's log2-sum under the matrix softmax, the two numbers of Attended.totals, and compute its mean delta,
    (1/K) sum_i dO[i] . w[i] O^c[i].

    KIND is 0 for the text query and 1 for the rational query.
    """
    place = (KIND * HEADS + head) * batch + b
    largest = tl.load(totals + place)
    log_sum = tl.load(totals + 2 * HEADS * batch + place)
    rows = batch * classes
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(CHUNKS):
        row = ((KIND * HEADS + head) * CHUNKS + chunk) * rows + b * classes
        for start in range(0, classes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(deltas + row + i, mask=i < classes, other=0.0)
    return largest, log_sum, tl.sum(total, 0) / classes


@triton.jit
def strided_sums(rows, columns, columns_valid, classes, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile (BLOCK, WIDTH) whose line l is the sum of the rows l, l + BLOCK, l + 2 BLOCK, ... of a matrix.

    rows: a pointer to the first of `classes` rows of D columns, of which WIDTH are read.
    """
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        valid = (i < classes)[:, None] & columns_valid[None, :]
        total += tl.load(rows + i[:, None] * D + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    return total
