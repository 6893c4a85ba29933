"""Find the tile that a program owns, and compute the scores of heads that are too wide to be read at once."""

import triton
import triton.language as tl

from rada_fast.kernels._common import product

LN2 = tl.constexpr(0.6931471805599453)
"""The factor that the gradients of scores have because scores are in base 2."""


@triton.jit
def program_place(program, tiles, GROUPS: tl.constexpr, HEADS: tl.constexpr):
    """Return the tile, group of output columns, head and image of a program.

    Neighbouring programs have different tiles of the same head, and so share its keys in the cache.
    """
    tile, rest = program % tiles, program // tiles
    group, rest = rest % GROUPS, rest // GROUPS
    head, b = rest % HEADS, (rest // HEADS).to(tl.int64)
    return tile, group, head, b


@triton.jit
def tile_place(tile, group, column, classes, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (rows, whether each exists, the group's columns, whether each exists, their positions in a full row)."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    row_valid = row < classes
    c = tl.arange(0, BLOCK_D)
    c_valid = group * BLOCK_D + c < HEAD
    return row, row_valid, c, c_valid, column + group * BLOCK_D + c


@triton.jit
def _load_piece(rows, valid, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load some columns of a head's rows, (rows, columns). The last piece may need a mask of its columns.

    rows: pointers to the rows. valid: whether each row exists; None where all of them can be read.
    """
    if valid is None:
        return tl.load(rows[:, None] + columns[None, :], mask=(columns < HEAD)[None, :], other=0.0)
    elif HEAD % BLOCK_C == 0:
        return tl.load(rows[:, None] + columns[None, :], mask=valid[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + columns[None, :], mask=valid[:, None] & (columns < HEAD)[None, :], other=0.0)


@triton.jit
def _load_transposed_piece(rows, valid, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load the same piece as _load_piece, transposed: (columns, rows)."""
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
    end=None,
):
    """Return left right^T, (BLOCK_L, BLOCK_R), for a head that is read in pieces.

    left, right: pointers to rows. end: HEAD if None, else see _end_of_pieces.
    left_valid, right_valid: whether each row exists; left_valid is None where all of the left rows can be read.
    """
    accumulator = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for c in range(0, HEAD if end is None else end, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x = _load_piece(left, left_valid, columns, HEAD, BLOCK_C)
        y = _load_transposed_piece(right, right_valid, columns, HEAD, BLOCK_C)
        accumulator = product(x, y, accumulator, PRECISION)
    return accumulator


@triton.jit
def _end_of_pieces(HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return HEAD, for a head of one piece as a number that Triton does not know, so that it keeps the loop.

    Without the loop, the scores of one query kind would get the layout of the product that follows them, and all four
    warps would compute the same scores.
    """
    if HEAD > BLOCK_C:
        return HEAD
    else:
        return tl.minimum(tl.num_programs(0), 1) * HEAD


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
    """Return split_head_scores of queries and keys, with the warps side by side along the queries.

    The sum of a row then stays in one warp.
    """
    if BLOCK_Q > BLOCK_K:
        scores = split_head_scores(
            keys, queries, key_valid, query_valid, HEAD, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION,
            _end_of_pieces(HEAD, BLOCK_C),
        )  # fmt: skip
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
    """Return query_scores of both query kinds, for which the keys are read once.

    The compiler places eight warps side by side along the queries only where two products share an operand. For a
    single product it makes two layers of four warps.
    """
    if BLOCK_Q > BLOCK_K:
        text_scores = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        rational_scores = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        for c in range(0, _end_of_pieces(HEAD, BLOCK_C), BLOCK_C):
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
