"""What the backward pass subtracts from dP: a sum of dO . O^c for each row, or their mean over a head."""

import triton
import triton.language as tl


@triton.jit
def row_deltas_kernel(deltas, sums, batch, classes, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[kind, head, b]: the sum of the deltas over a head's chunks, which the row softmax subtracts.

    Axis 0: query kind, head, image.
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
    """Of one query kind (0: text, 1: rational), head and image under the matrix softmax: the head's log2-sum, and
    (1/K) sum_i dO[i] . O^c[i]."""
    rows = batch * classes
    log_sum = tl.load(totals + (KIND * HEADS + head) * batch + b)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(CHUNKS):
        row = ((KIND * HEADS + head) * CHUNKS + chunk) * rows + b * classes
        for start in range(0, classes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(deltas + row + i, mask=i < classes, other=0.0)
    return log_sum, tl.sum(total, 0) / classes
