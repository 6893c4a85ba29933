"""Add up what the programs of the backward pass need of a whole head: its mean delta, and rows of a matrix."""

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(4)
"""The number of blocks of rows that are loaded together before they are added up."""


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
    # The chunks are loaded together, so that their loads do not wait for each other.
    lines: tl.constexpr = triton.next_power_of_2(CHUNKS)
    chunk = tl.arange(0, lines)[:, None]
    parts = deltas + ((KIND * HEADS + head) * CHUNKS + chunk) * rows + b * classes
    total = tl.zeros((lines, BLOCK), tl.float32)
    for start in range(0, classes, BLOCK):
        i = (start + tl.arange(0, BLOCK))[None, :]
        total += tl.load(parts + i, mask=(chunk < CHUNKS) & (i < classes), other=0.0)
    return largest, log_sum, tl.sum(total) / classes


@triton.jit
def strided_sums(rows, columns, columns_valid, classes, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile (BLOCK, WIDTH) whose line l is the sum of the rows l, l + BLOCK, l + 2 BLOCK, ... of a matrix.

    rows: a pointer to the first of `classes` rows of D columns, of which WIDTH are read.
    """
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for first in range(0, classes, AT_ONCE * BLOCK):
        # The loads of several blocks are under way together.
        for block in tl.static_range(AT_ONCE):
            i = first + block * BLOCK + tl.arange(0, BLOCK)
            valid = (i < classes)[:, None] & columns_valid[None, :]
            total += tl.load(rows + i[:, None] * D + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    return total
