"""Compute the deltas that the backward pass subtracts from dP: dO . w O^c for each row, or their mean over a head."""

import triton
import triton.language as tl

from rada_fast.kernels._launch import Kernel


@Kernel
def row_deltas_kernel(deltas, sums, batch, classes, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up each row's deltas over the chunks of a head into sums[kind, head, b], for the row softmax.

    Axis 0 of the grid: query kind, head, image.
    """
    program = tl.program_id(0).to(tl.int64)
    first, b = program // batch * CHUNKS, program % batch
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(CHUNKS):
            total += tl.load(deltas + ((first + chunk) * batch + b) * classes + i, mask=i < classes, other=0.0)
        tl.store(sums + program * classes + i, total, mask=i < classes)


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
    rows = batch * classes
    place = (KIND * HEADS + head) * batch + b
    largest = tl.load(totals + place)
    log_sum = tl.load(totals + 2 * HEADS * batch + place)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(CHUNKS):
        row = ((KIND * HEADS + head) * CHUNKS + chunk) * rows + b * classes
        for start in range(0, classes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(deltas + row + i, mask=i < classes, other=0.0)
    return largest, log_sum, tl.sum(total, 0) / classes
