"""Which tile a program owns, and the scores of heads that are too wide to be read at once."""

import triton
import triton.language as tl

from rada_fast.kernels._common import product

LN2 = tl.constexpr(0.6931471805599453)
"""Scores are in base 2; their gradients carry this factor."""


@triton.jit
def program_place(tiles, GROUPS: tl.constexpr, HEADS: tl.constexpr):
    """A program's tile, group of output columns, head and image. Neighbours differ in the tile and share their keys."""
    program = tl.program_id(0)
    tile, rest = program % tiles, program // tiles
    group, rest = rest % GROUPS, rest // GROUPS
    head, b = rest % HEADS, (rest // HEADS).to(tl.int64)
    return tile, group, head, b


@triton.jit
def tile_place(tile, group, column, classes, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, which of them exist, columns of the group, which of them exist, their places in a row of all heads)."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    row_valid = row < classes
    c = tl.arange(0, BLOCK_D)
    c_valid = group * BLOCK_D + c < HEAD
    return row, row_valid, c, c_valid, column + group * BLOCK_D + c


@triton.jit
def _load_piece(rows, valid, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some columns of a head's rows, (rows, columns). rows: pointers; the last piece may have columns to spare.

    valid: which of the rows exist; None where all of them can be read."""
    if valid is None:
        return tl.load(rows[:, None] + columns[None, :], mask=(columns < HEAD)[None, :], other=0.0)
    elif HEAD % BLOCK_C == 0:
        return tl.load(rows[:, None] + columns[None, :], mask=valid[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + columns[None, :], mask=valid[:, None] & (columns < HEAD)[None, :], other=0.0)


@triton.jit
def _load_transposed_piece(rows, valid, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """What _load_piece returns, transposed: (columns, rows)."""
    if HEAD % BLOCK_C == 0:
        return tl.load(rows[None, :] + columns[:, None], mask=valid[None, :], other=0.0)
    else:
        return tl.load(rows[None, :] + columns[:, None], mask=valid[None, :] & (columns < HEAD)[:, None], other=0.0)


@triton.jit
def split_head_scores(
    left,
    right,
    left_valid,
    right_valid,
    HEAD: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left right^T, (BLOCK_L, BLOCK_R), over a head that is read in pieces. left, right: pointers to rows.

    left_valid, right_valid: which of the rows exist; left_valid is None where all of the left rows can be read."""
    accumulator = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for c in range(0, HEAD, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x = _load_piece(left, left_valid, columns, HEAD, BLOCK_C)
        y = _load_transposed_piece(right, right_valid, columns, HEAD, BLOCK_C)
        accumulator = product(x, y, accumulator, PRECISION)
    return accumulator


@triton.jit
def query_scores(
    queries,
    keys,
    query_valid,
    key_valid,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """split_head_scores of queries and keys with the warps side by side along the queries, so that the sum of a row
    stays in one warp. A head of one piece makes no loop, and the compiler then places the warps so by itself."""
    if BLOCK_Q > BLOCK_K and HEAD > BLOCK_C:
        scores = split_head_scores(keys, queries, key_valid, query_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
        return tl.trans(scores)
    else:
        return split_head_scores(queries, keys, query_valid, key_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)


@triton.jit
def text_and_rational_scores(
    text,
    rational,
    keys,
    query_valid,
    key_valid,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """query_scores of both kinds, for which keys are read once. The compiler places eight warps side by side along the
    queries only where two products share an operand; for a single product it makes two layers of four warps."""
    if BLOCK_Q > BLOCK_K and HEAD > BLOCK_C:
        text_scores = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        rational_scores = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        for c in range(0, HEAD, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            k = _load_piece(keys, key_valid, columns, HEAD, BLOCK_C)
            q = _load_transposed_piece(text, query_valid, columns, HEAD, BLOCK_C)
            text_scores = product(k, q, text_scores, PRECISION)
            q = _load_transposed_piece(rational, query_valid, columns, HEAD, BLOCK_C)
            rational_scores = product(k, q, rational_scores, PRECISION)
        return tl.trans(text_scores), tl.trans(rational_scores)
    else:
        return (
            split_head_scores(text, keys, query_valid, key_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION),
            split_head_scores(rational, keys, query_valid, key_valid, HEAD, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION),
        )
