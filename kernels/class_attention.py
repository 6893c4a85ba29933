"""Attention over classes: the three query kinds against one set of keys and values (RAda, arXiv:2507.15480, Eq. 6).

    S^c[i, j] = q^c[i] . k[j] / (sqrt(d) tau)
    row softmax: P^c[i, :] = softmax(S^c[i, :]);   matrix softmax: P^c = K exp(S^c) / sum_ij exp(S^c)

Both forms share one online softmax by rows: O^c leaves normalised by its own row, beside the row's log-sum. The matrix
form is the same times w[i] = K exp(logsum[i] - logsum of the whole head), one small launch that consumers multiply by.
Text and rational queries walk the keys together, so that keys and values are read once for both; the image query is one
row, an additional program of each head. Backward, dO . v is common to all kinds; a launch owns queries, another
one keys, before them a small one sums the row softmax's deltas, and nothing is added up by atomics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_fast.kernels._common import (
    LOG2E,
    block_of,
    cdiv,
    default_precision,
    product,
    quads,
    store_column_sums,
)
from rada_fast.kernels.rational_projections import ProjectionBuffers


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile; output columns of a program; warps; pipeline stages."""

    queries: int
    keys: int
    columns: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, classes: int, head: int, *, backward: bool = False, precision: str = "ieee") -> Tile:
    """The table, for A100's 164 KB of shared memory and 255 registers a thread."""
    wide = head > 128
    columns = min(max(16, triton.next_power_of_2(head)), 128)
    if dtype == torch.float32:
        # Products without tensor cores hold all of both operands in registers, those of three TF32 products each of
        # them three times: short reductions, and one stage, since another sends the parts through shared memory.
        if precision == "ieee":
            return Tile(32, 16 if backward else 32, min(columns, 64), 8 if head > 64 else 4, 1)
        # Eight warps side by side or four one above the other: elsewhere some would make the same products. Heads of
        # 16 spill 32 bytes forward on sm_80, in the mask of the half of 32 columns that they do not have.
        return Tile(16, 64, 64, 8, 1) if backward else Tile(64, 16, 32, 4, 1)
    if backward and wide:
        # Wider than high, so that eight warps lie side by side; a head's last piece may be masked in part.
        return Tile(32, 32, 64, 8, 2)
    if backward and head > 64:
        # dk and dv of 64 x 128 spill. Scores that are wider than high have their warps side by side: 32 x 32 would lay
        # eight over two strips of 16 rows, four times the same product.
        return Tile(32, 64, columns, 8, 2)
    if wide:
        # Two accumulators of 64 x 128 take 128 registers of a thread at four warps: eight halve that.
        return Tile(64, 32, columns, 8, 2)
    if head > 64:
        # A strip of 16 rows for each of eight warps: on 64 rows two would make the same scores. Heads of 128 spill two
        # registers on sm_80, on other tiles more.
        return Tile(128, 32, columns, 8, 2)
    if classes <= 256 or backward:
        # Tails weigh: 200 classes are 7 blocks of 32 keys, 4 blocks of 64 would be 28 % more. Backward, two
        # accumulators and three score tiles of 64 x 64 spill, and eight warps on 64 x 32 do every product twice.
        return Tile(64, 32, columns, 4, 2)
    return Tile(128, 64, columns, 8, 2)


def _is_wide(dtype: torch.dtype, head: int, tile: Tile) -> bool:
    """Whether scores go through a head in pieces; float32's always do, see tile_of."""
    return head > tile.columns or dtype == torch.float32


def _depth(dtype: torch.dtype, head: int) -> int:
    """Columns of such a piece."""
    return 16 if dtype == torch.float32 else max(16, block_of(head, 64))


@triton.jit
def _piece(rows, ok, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some columns of a head's rows, (rows, columns). rows: pointers to them; the last piece may be one in part."""
    if HEAD % BLOCK_C == 0:
        return tl.load(rows[:, None] + columns[None, :], mask=ok[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + columns[None, :], mask=ok[:, None] & (columns < HEAD)[None, :], other=0.0)


@triton.jit
def _turned_piece(rows, ok, columns, HEAD: tl.constexpr, BLOCK_C: tl.constexpr):
    """_piece as (columns, rows)."""
    if HEAD % BLOCK_C == 0:
        return tl.load(rows[None, :] + columns[:, None], mask=ok[None, :], other=0.0)
    else:
        return tl.load(rows[None, :] + columns[:, None], mask=ok[None, :] & (columns < HEAD)[:, None], other=0.0)


@triton.jit
def _scores(
    left, right, left_ok, right_ok, HEAD: tl.constexpr, D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left right^T over a head too wide to be held: (BLOCK_L, BLOCK_R). left, right: pointers to rows."""
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for c in range(0, HEAD, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        x = _piece(left, left_ok, columns, HEAD, BLOCK_C)
        y = _turned_piece(right, right_ok, columns, HEAD, BLOCK_C)
        acc = product(x, y, acc, PRECISION)
    return acc


@triton.jit
def _query_scores(
    queries, keys, i_ok, j_ok, HEAD: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_scores of queries that leaves the warps side by side over the queries, so that a row's sum stays in one. A
    single piece makes no loop, and the compiler lays it out for the product that follows, side by side anyway."""
    if BLOCK_Q > BLOCK_K and HEAD > BLOCK_C:
        return tl.trans(_scores(keys, queries, j_ok, i_ok, HEAD, D, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION))
    else:
        return _scores(queries, keys, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)


@triton.jit
def _both_scores(
    queries, others, keys, i_ok, j_ok, HEAD: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_query_scores of two kinds. Keys are read once, and two products that share an operand keep eight warps side by
    side, where one alone has them in two layers."""
    if BLOCK_Q > BLOCK_K and HEAD > BLOCK_C:
        acc = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        other = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
        for c in range(0, HEAD, BLOCK_C):
            columns = c + tl.arange(0, BLOCK_C)
            k = _piece(keys, j_ok, columns, HEAD, BLOCK_C)
            q = _turned_piece(queries, i_ok, columns, HEAD, BLOCK_C)
            acc = product(k, q, acc, PRECISION)
            q = _turned_piece(others, i_ok, columns, HEAD, BLOCK_C)
            other = product(k, q, other, PRECISION)
        return tl.trans(acc), tl.trans(other)
    else:
        return (
            _scores(queries, keys, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION),
            _scores(others, keys, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION),
        )


@triton.jit
def _online(scores, top, total, out, v, PRECISION: tl.constexpr):
    """One step of the online softmax by rows."""
    new = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new[:, None])
    fade = tl.exp2(top - new)
    total = total * fade + tl.sum(p, 1)
    out = product(p.to(v.dtype), v, out * fade[:, None], PRECISION)
    return new, total, out


@triton.jit
def class_attention_forward_kernel(
    q_image, q_text, q_rational, keys, values, attended_image, attended_text, attended_rational, logsums, image_logsums,
    batch, classes, tiles, images_per_text, scale,
    D: tl.constexpr, HEAD: tl.constexpr, HEAD_VECTOR: tl.constexpr,
    IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Axis 0: query tile (the last one is the image query), output columns, head, image; neighbours share keys."""
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    all_tiles = tiles
    if IMAGE:
        all_tiles += 1
    program = tl.program_id(0)
    tile, rest = program % all_tiles, program // all_tiles
    group, rest = rest % groups, rest // groups
    head, b = rest % heads, (rest // heads).to(tl.int64)
    column = head * HEAD
    first = b * classes
    if tile < tiles:
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        i_ok = i < classes
        c = tl.arange(0, BLOCK_D)
        c_ok = group * BLOCK_D + c < HEAD
        mine = column + group * BLOCK_D + c
        if TEXT:
            text_rows = q_text + ((b // images_per_text) * classes * D + column) + i * D
            if not WIDE:
                qt = tl.load(text_rows[:, None] + c[None, :], mask=i_ok[:, None] & c_ok[None, :], other=0.0)
        if RATIONAL:
            rational_rows = q_rational + (first * D + column) + i * D
            if not WIDE:
                qr = tl.load(rational_rows[:, None] + c[None, :], mask=i_ok[:, None] & c_ok[None, :], other=0.0)
        top_t = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        top_r = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total_t = tl.zeros((BLOCK_Q,), tl.float32)
        total_r = tl.zeros((BLOCK_Q,), tl.float32)
        out_t = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        out_r = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            j_ok = j < classes
            v = tl.load(
                values + first * D + (j[:, None] * D + mine[None, :]), mask=j_ok[:, None] & c_ok[None, :], other=0.0
            )
            key_rows = keys + (first * D + column) + j * D
            if not WIDE:
                k = tl.load(key_rows[None, :] + c[:, None], mask=j_ok[None, :] & c_ok[:, None], other=0.0)
            if WIDE and TEXT and RATIONAL:
                s_t, s_r = _both_scores(
                    text_rows, rational_rows, key_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION
                )
            elif WIDE and TEXT:
                s_t = _query_scores(text_rows, key_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
            elif WIDE and RATIONAL:
                s_r = _query_scores(rational_rows, key_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
            if TEXT:
                if not WIDE:
                    s_t = product(qt, k, None, PRECISION)
                s = tl.where(j_ok[None, :], s_t * scale, float("-inf"))
                top_t, total_t, out_t = _online(s, top_t, total_t, out_t, v, PRECISION)
            if RATIONAL:
                if not WIDE:
                    s_r = product(qr, k, None, PRECISION)
                s = tl.where(j_ok[None, :], s_r * scale, float("-inf"))
                top_r, total_r, out_r = _online(s, top_r, total_r, out_r, v, PRECISION)
        at = i[:, None] * D + mine[None, :]
        ok = i_ok[:, None] & c_ok[None, :]
        rows = batch * classes
        # Every group of columns has the same log-sums; the first one tells.
        tell = i < tl.where(group == 0, classes, 0)
        if TEXT:
            out_t = out_t / total_t[:, None]
            tl.store(attended_text + first * D + at, out_t.to(attended_text.dtype.element_ty), mask=ok)
            tl.store(logsums + (head * rows + first) + i, top_t + tl.log2(total_t), mask=tell)
        if RATIONAL:
            out_r = out_r / total_r[:, None]
            tl.store(attended_rational + first * D + at, out_r.to(attended_rational.dtype.element_ty), mask=ok)
            tl.store(logsums + ((heads + head) * rows + first) + i, top_r + tl.log2(total_r), mask=tell)
    elif IMAGE:
        if group == 0:
            c = quads(HEAD_VECTOR)
            c_ok = c < HEAD
            q = tl.load(q_image + b * D + column + c, mask=c_ok, other=0.0) * scale
            # Every row of the tile has a softmax of its own, so that nothing crosses warps before the end.
            # -1e38: a maximum that is no NaN when two are subtracted.
            top = tl.full((BLOCK_I,), -1e38, tl.float32)
            total = tl.zeros((BLOCK_I,), tl.float32)
            out = tl.zeros((BLOCK_I, HEAD_VECTOR), tl.float32)
            for start in range(0, classes, BLOCK_I):
                j = start + tl.arange(0, BLOCK_I)
                j_ok = j < classes
                at = (first + j)[:, None] * D + (column + c)[None, :]
                ok = j_ok[:, None] & c_ok[None, :]
                k = tl.load(keys + at, mask=ok, other=0.0).to(tl.float32)
                s = tl.where(j_ok, tl.sum(k * q[None, :], 1), float("-inf"))
                new = tl.maximum(top, s)
                fade = tl.exp2(top - new)
                p = tl.exp2(s - new)
                v = tl.load(values + at, mask=ok, other=0.0).to(tl.float32)
                total = total * fade + p
                out = out * fade[:, None] + p[:, None] * v
                top = new
            best = tl.max(tl.broadcast_to(top[:, None], (BLOCK_I, HEAD_VECTOR)))
            fade = tl.exp2(top - best)
            whole = tl.sum(tl.where((c == 0)[None, :], (total * fade)[:, None], 0.0))
            out = out * (fade / whole)[:, None]
            store_column_sums(attended_image + b * D + column + c, tl.sum(out, 0), c_ok, BLOCK_I, HEAD_VECTOR)
            tl.store(image_logsums + b * heads + head, best + tl.log2(whole))


@triton.jit
def softmax_factors_kernel(logsums, factors, totals, batch, classes, BLOCK: tl.constexpr):
    """w[i] = K exp2(logsum[i] - log-sum of the head's whole matrix), and that log-sum less log2 K. Axis 0: kind, head,
    image."""
    row = tl.program_id(0).to(tl.int64) * classes
    # -1e38: a maximum that is no NaN when two are subtracted.
    top = tl.full((BLOCK,), -1e38, tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(logsums + row + i, mask=i < classes, other=-1e38))
    best = tl.max(top, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.exp2(tl.load(logsums + row + i, mask=i < classes, other=float("-inf")) - best)
    whole = best + tl.log2(tl.sum(total, 0) / classes)
    tl.store(totals + tl.program_id(0), whole)
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.exp2(tl.load(logsums + row + i, mask=i < classes, other=float("-inf")) - whole)
        tl.store(factors + row + i, w, mask=i < classes)


@dataclass
class Attended:
    """O^text, O^rational (B, K, D) normalised by rows, O^image (B, D) float32; log2-sums (2, H, B, K) and (B, H);
    for the matrix softmax the rows' factors w (2, H, B, K) and a head's log2-sum less log2 K (2, H, B)."""

    text: Tensor | None
    rational: Tensor | None
    image: Tensor | None
    logsums: Tensor
    image_logsums: Tensor
    factors: Tensor | None
    totals: Tensor | None


def class_attention_forward(
    projections: ProjectionBuffers,
    *,
    num_heads: int,
    temperature: float,
    matrix: bool,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Attended:
    """Attention of every query kind in use over the classes, in one launch, for the matrix softmax two.

    projections: as rational_projections_forward returns them. temperature: divides the scores, next to sqrt(d).
    """
    keys, values = projections.keys, projections.values
    batch, classes, width = keys.shape
    head = width // num_heads
    tile = tile or tile_of(keys.dtype, classes, head, precision=precision)
    exact = {"dtype": torch.float32, "device": keys.device}
    text, rational, image = projections.q_text, projections.q_rational, projections.q_image
    made = Attended(
        None if text is None else torch.empty_like(keys),
        None if rational is None else torch.empty_like(keys),
        None if image is None else torch.empty_like(image),
        torch.empty((2, num_heads, batch, classes), **exact),
        torch.empty((batch, num_heads), **exact),
        torch.empty((2, num_heads, batch, classes), **exact) if matrix else None,
        torch.empty((2, num_heads, batch), **exact) if matrix else None,
    )
    if batch == 0:
        return made
    wide_kinds = text is not None or rational is not None
    tiles = cdiv(classes, tile.queries) if wide_kinds else 0
    programs = batch * num_heads * cdiv(head, tile.columns) * (tiles + (image is not None))
    vector = triton.next_power_of_2(head)
    wide = _is_wide(keys.dtype, head, tile)
    class_attention_forward_kernel[(programs,)](
        image, text, rational, keys, values, made.image, made.text, made.rational, made.logsums, made.image_logsums,
        batch, classes, tiles, batch // (text.shape[0] if text is not None else 1),
        LOG2E / (math.sqrt(head) * temperature),
        D=width, HEAD=head, HEAD_VECTOR=vector,
        IMAGE=image is not None, TEXT=text is not None, RATIONAL=rational is not None, WIDE=wide,
        BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_D=tile.columns,
        BLOCK_C=_depth(keys.dtype, head),
        BLOCK_I=max(1, min(64, 4096 // vector)), PRECISION=default_precision(keys.dtype, precision),
        # One kind alone has four warps side by side, eight in two layers (see _both_scores).
        num_warps=min(tile.warps, 4) if wide and (text is None or rational is None) else tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if matrix and wide_kinds:
        assert made.factors is not None
        # Only the kinds in use: their rows lie together.
        first, last = 0 if text is not None else 1, 2 if rational is not None else 1
        softmax_factors_kernel[((last - first) * num_heads * batch,)](
            made.logsums[first:last], made.factors[first:last], made.totals[first:last], batch, classes,
            BLOCK=max(128, min(1024, triton.next_power_of_2(classes))), num_warps=4,
        )  # fmt: skip
    return made


@triton.jit
def row_deltas_kernel(deltas, sums, batch, classes, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[kind, head, b] = deltas' sum over a head's chunks, which the row softmax subtracts. Axis 0: kind, head,
    image."""
    program = tl.program_id(0).to(tl.int64)
    first, b = program // batch * CHUNKS, program % batch
    for start in range(0, classes, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(CHUNKS):
            total += tl.load(deltas + ((first + chunk) * batch + b) * classes + i, mask=i < classes, other=0.0)
        tl.store(sums + program * classes + i, total, mask=i < classes)


@triton.jit
def _mean_delta(deltas, first, classes, rows, head, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """(1/K) sum_i dO[i] . O^c[i] of a head."""
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(CHUNKS):
        row = (head * CHUNKS + chunk) * rows + first
        for start in range(0, classes, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(deltas + row + i, mask=i < classes, other=0.0)
    return tl.sum(total, 0) / classes


@triton.jit
def class_attention_backward_queries_kernel(
    q_image, q_text, q_rational, keys, values, dattended, attended_image, logsums, image_logsums, totals, deltas,
    dq_image, dq_text, dq_rational, image_pairs, dattended_sum,
    batch, classes, tiles, images_per_text, scale, share,
    D: tl.constexpr, HEAD: tl.constexpr, HEAD_VECTOR: tl.constexpr, CHUNKS: tl.constexpr,
    IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, WIDE: tl.constexpr, MATRIX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries over all keys; programs as in the forward. scale: in base 2; share: 1/|Q|."""
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    natural = scale * 0.6931471805599453 * share
    all_tiles = tiles
    if IMAGE:
        all_tiles += 1
    program = tl.program_id(0)
    tile, rest = program % all_tiles, program // all_tiles
    group, rest = rest % groups, rest // groups
    head, b = rest % heads, (rest // heads).to(tl.int64)
    column = head * HEAD
    first = b * classes
    rows = batch * classes
    all_chunks: tl.constexpr = heads * CHUNKS
    if tile < tiles:
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        i_ok = i < classes
        c = tl.arange(0, BLOCK_D)
        c_ok = group * BLOCK_D + c < HEAD
        mine = column + group * BLOCK_D + c
        held = i_ok[:, None] & c_ok[None, :]
        dattended_rows = dattended + (first + i) * D + column
        if not WIDE:
            do = tl.load(dattended_rows[:, None] + c[None, :], mask=held, other=0.0)
        if TEXT:
            text_rows = q_text + ((b // images_per_text) * classes + i) * D + column
            if not WIDE:
                qt = tl.load(text_rows[:, None] + c[None, :], mask=held, other=0.0)
            if MATRIX:
                norm_t = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(totals + head * batch + b)
                delta_t = tl.zeros((BLOCK_Q,), tl.float32)
                delta_t += _mean_delta(deltas, first, classes, rows, head, CHUNKS, BLOCK_S)
            else:
                norm_t = tl.load(logsums + head * rows + first + i, mask=i_ok, other=0.0)
                delta_t = tl.load(deltas + head * rows + first + i, mask=i_ok, other=0.0)
        if RATIONAL:
            rational_rows = q_rational + (first + i) * D + column
            if not WIDE:
                qr = tl.load(rational_rows[:, None] + c[None, :], mask=held, other=0.0)
            if MATRIX:
                norm_r = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(totals + (heads + head) * batch + b)
                delta_r = tl.zeros((BLOCK_Q,), tl.float32)
                delta_r += _mean_delta(deltas + all_chunks * rows, first, classes, rows, head, CHUNKS, BLOCK_S)
            else:
                norm_r = tl.load(logsums + (heads + head) * rows + first + i, mask=i_ok, other=0.0)
                delta_r = tl.load(deltas + (heads + head) * rows + first + i, mask=i_ok, other=0.0)
        dq_t = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        dq_r = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for start in range(0, classes, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            j_ok = j < classes
            key_rows = keys + (first + j) * D + column
            value_rows = values + (first + j) * D + column
            k = tl.load(keys + (first + j)[:, None] * D + mine[None, :], mask=j_ok[:, None] & c_ok[None, :], other=0.0)
            if WIDE:
                dp = _scores(dattended_rows, value_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
            else:
                v = tl.load(value_rows[None, :] + c[:, None], mask=j_ok[None, :] & c_ok[:, None], other=0.0)
                dp = product(do, v, None, PRECISION)
            # Keys beyond the last are rows of zeros: whatever their dS is, it adds nothing.
            if TEXT:
                if WIDE:
                    s = _scores(text_rows, key_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
                else:
                    s = product(qt, tl.trans(k), None, PRECISION)
                p = tl.exp2(tl.where(j_ok[None, :], s * scale - norm_t[:, None], float("-inf")))
                ds = p * (dp - delta_t[:, None])
                dq_t = product(ds.to(k.dtype), k, dq_t, PRECISION)
            if RATIONAL:
                if WIDE:
                    s = _scores(rational_rows, key_rows, i_ok, j_ok, HEAD, D, BLOCK_Q, BLOCK_K, BLOCK_C, PRECISION)
                else:
                    s = product(qr, tl.trans(k), None, PRECISION)
                p = tl.exp2(tl.where(j_ok[None, :], s * scale - norm_r[:, None], float("-inf")))
                ds = p * (dp - delta_r[:, None])
                dq_r = product(ds.to(k.dtype), k, dq_r, PRECISION)
        at = (first + i)[:, None] * D + mine[None, :]
        if TEXT:
            tl.store(dq_text + at, (dq_t * natural).to(dq_text.dtype.element_ty), mask=held)
        if RATIONAL:
            tl.store(dq_rational + at, (dq_r * natural).to(dq_rational.dtype.element_ty), mask=held)
    elif IMAGE:
        if group == 0:
            c = quads(HEAD_VECTOR)
            c_ok = c < HEAD
            row = b * D + column + c
            rows_of_do = tl.zeros((BLOCK_I, HEAD_VECTOR), tl.float32)
            for start in range(0, classes, BLOCK_I):
                i = start + tl.arange(0, BLOCK_I)
                ok = (i < classes)[:, None] & c_ok[None, :]
                part = tl.load(dattended + (first + i)[:, None] * D + (column + c)[None, :], mask=ok, other=0.0)
                rows_of_do += part.to(tl.float32)
            do = tl.sum(rows_of_do, 0)
            store_column_sums(dattended_sum + row, do, c_ok, BLOCK_I, HEAD_VECTOR)
            delta = tl.sum(rows_of_do * tl.load(attended_image + row, mask=c_ok, other=0.0)[None, :])
            q = tl.load(q_image + row, mask=c_ok, other=0.0) * scale
            logsum = tl.load(image_logsums + b * heads + head)
            dq = tl.zeros((BLOCK_I, HEAD_VECTOR), tl.float32)
            for start in range(0, classes, BLOCK_I):
                j = start + tl.arange(0, BLOCK_I)
                j_ok = j < classes
                at = (first + j)[:, None] * D + (column + c)[None, :]
                ok = j_ok[:, None] & c_ok[None, :]
                k = tl.load(keys + at, mask=ok, other=0.0).to(tl.float32)
                p = tl.exp2(tl.sum(k * q[None, :], 1) - logsum)
                v = tl.load(values + at, mask=ok, other=0.0).to(tl.float32)
                ds = p * (tl.sum(v * do[None, :], 1) - delta)
                dq += ds[:, None] * k
                # P and dS of a key in turns, from the tile's own layout: one thread's four columns.
                there = ((b * heads + head) * classes + j)[:, None] * 4 + c[None, :]
                pair = tl.where((c % 2 == 0)[None, :], (p * share)[:, None], (ds * natural)[:, None])
                tl.store(image_pairs + there, pair, mask=j_ok[:, None] & (c < 4)[None, :])
            store_column_sums(dq_image + row, tl.sum(dq, 0) * natural, c_ok, BLOCK_I, HEAD_VECTOR)


@triton.jit
def class_attention_backward_keys_kernel(
    q_image, q_text, q_rational, keys, values, dattended, logsums, totals, deltas, image_pairs, dattended_sum,
    dkeys, dvalues,
    batch, classes, tiles, images_per_text, scale, share,
    D: tl.constexpr, HEAD: tl.constexpr, CHUNKS: tl.constexpr,
    IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, WIDE: tl.constexpr, MATRIX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys over all queries. Scores are transposed, (keys, queries), so that no P is."""
    heads: tl.constexpr = D // HEAD
    groups: tl.constexpr = (HEAD + BLOCK_D - 1) // BLOCK_D
    all_chunks: tl.constexpr = heads * CHUNKS
    natural = scale * 0.6931471805599453 * share
    program = tl.program_id(0)
    tile, rest = program % tiles, program // tiles
    group, rest = rest % groups, rest // groups
    head, b = rest % heads, (rest // heads).to(tl.int64)
    column = head * HEAD
    first = b * classes
    rows = batch * classes
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    j_ok = j < classes
    c = tl.arange(0, BLOCK_D)
    c_ok = group * BLOCK_D + c < HEAD
    mine = column + group * BLOCK_D + c
    held = j_ok[:, None] & c_ok[None, :]
    key_rows = keys + (first + j) * D + column
    value_rows = values + (first + j) * D + column
    if not WIDE:
        k = tl.load(key_rows[:, None] + c[None, :], mask=held, other=0.0)
        v = tl.load(value_rows[:, None] + c[None, :], mask=held, other=0.0)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if TEXT or RATIONAL:
        mean_t = 0.0
        mean_r = 0.0
        total_t = 0.0
        total_r = 0.0
        if MATRIX and TEXT:
            mean_t = _mean_delta(deltas, first, classes, rows, head, CHUNKS, BLOCK_S)
            total_t = tl.load(totals + head * batch + b)
        if MATRIX and RATIONAL:
            mean_r = _mean_delta(deltas + all_chunks * rows, first, classes, rows, head, CHUNKS, BLOCK_S)
            total_r = tl.load(totals + (heads + head) * batch + b)
        for start in range(0, classes, BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            i_ok = i < classes
            here = i_ok[:, None] & c_ok[None, :]
            dattended_rows = dattended + (first + i) * D + column
            do = tl.load(dattended + (first + i)[:, None] * D + mine[None, :], mask=here, other=0.0)
            if WIDE:
                dp = _scores(value_rows, dattended_rows, j_ok, i_ok, HEAD, D, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
            else:
                dp = product(v, tl.trans(do), None, PRECISION)
            both = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
            if TEXT:
                text_rows = q_text + ((b // images_per_text) * classes + i) * D
                q = tl.load(text_rows[:, None] + mine[None, :], mask=here, other=0.0)
                if WIDE:
                    s = _scores(key_rows, text_rows + column, j_ok, i_ok, HEAD, D, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION)
                else:
                    s = product(k, tl.trans(q), None, PRECISION)
                if MATRIX:
                    norm = tl.where(i_ok, total_t, float("inf"))
                    delta = tl.where(i_ok, mean_t, 0.0)
                else:
                    norm = tl.load(logsums + head * rows + first + i, mask=i_ok, other=float("inf"))
                    delta = tl.load(deltas + head * rows + first + i, mask=i_ok, other=0.0)
                p = tl.exp2(s * scale - norm[None, :])
                both += p
                ds = p * (dp - delta[None, :])
                dk = product(ds.to(q.dtype), q, dk, PRECISION)
            if RATIONAL:
                rational_rows = q_rational + (first + i) * D
                q = tl.load(rational_rows[:, None] + mine[None, :], mask=here, other=0.0)
                if WIDE:
                    s = _scores(
                        key_rows, rational_rows + column, j_ok, i_ok, HEAD, D, BLOCK_K, BLOCK_Q, BLOCK_C, PRECISION
                    )
                else:
                    s = product(k, tl.trans(q), None, PRECISION)
                if MATRIX:
                    norm = tl.where(i_ok, total_r, float("inf"))
                    delta = tl.where(i_ok, mean_r, 0.0)
                else:
                    norm = tl.load(logsums + (heads + head) * rows + first + i, mask=i_ok, other=float("inf"))
                    delta = tl.load(deltas + (heads + head) * rows + first + i, mask=i_ok, other=0.0)
                p = tl.exp2(s * scale - norm[None, :])
                both += p
                ds = p * (dp - delta[None, :])
                dk = product(ds.to(q.dtype), q, dk, PRECISION)
            dv = product(both.to(do.dtype), do, dv, PRECISION)
    dk *= natural
    dv *= share
    if IMAGE:
        there = ((b * heads + head) * classes + j) * 4
        p = tl.load(image_pairs + there, mask=j_ok, other=0.0)
        ds = tl.load(image_pairs + there + 1, mask=j_ok, other=0.0)
        dv += p[:, None] * tl.load(dattended_sum + b * D + mine, mask=c_ok, other=0.0)[None, :]
        dk += ds[:, None] * tl.load(q_image + b * D + mine, mask=c_ok, other=0.0)[None, :]
    at = (first + j)[:, None] * D + mine[None, :]
    tl.store(dkeys + at, dk.to(dkeys.dtype.element_ty), mask=held)
    tl.store(dvalues + at, dv.to(dvalues.dtype.element_ty), mask=held)


def class_attention_backward(
    projections: ProjectionBuffers,
    attended: Attended,
    dattended: Tensor,
    deltas: Tensor,
    *,
    num_heads: int,
    temperature: float,
    matrix: bool,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> ProjectionBuffers:
    """Gradients of every projection, in two launches, for the row softmax in three; q_text's is (B, K, D).

    dattended: dO, (B, K, D); deltas: (2, D/g, B, K) float32, dO . w O^c over chunks of g columns, text query first.
    """
    keys, values = projections.keys, projections.values
    batch, classes, width = keys.shape
    head = width // num_heads
    tile = tile or tile_of(keys.dtype, classes, head, backward=True, precision=precision)
    text, rational, image = projections.q_text, projections.q_rational, projections.q_image
    made = ProjectionBuffers(
        torch.empty_like(keys),
        torch.empty_like(keys),
        None if rational is None else torch.empty_like(keys),
        None if text is None else torch.empty_like(keys),
        None if image is None else torch.empty_like(image),
    )
    if batch == 0:
        return made
    exact = {"dtype": torch.float32, "device": keys.device}
    image_pairs = torch.empty((batch, num_heads, classes, 4), **exact) if image is not None else None
    dattended_sum = torch.empty((batch, width), **exact) if image is not None else None
    kinds = [text is not None, rational is not None, image is not None]
    tiles = cdiv(classes, tile.queries) if any(kinds[:2]) else 0
    groups = cdiv(head, tile.columns)
    vector = triton.next_power_of_2(head)
    per_text = batch // (text.shape[0] if text is not None else 1)
    scale, share = LOG2E / (math.sqrt(head) * temperature), 1 / sum(kinds)
    chunks = deltas.shape[1] // num_heads
    if not matrix and any(kinds[:2]):
        # Only the kinds in use: their rows lie together.
        used = slice(0 if kinds[0] else 1, 2 if kinds[1] else 1)
        parts, deltas = deltas, torch.empty((2, num_heads, batch, classes), **exact)
        row_deltas_kernel[(sum(kinds[:2]) * num_heads * batch,)](
            parts[used], deltas[used], batch, classes,
            CHUNKS=chunks, BLOCK=max(128, min(1024, triton.next_power_of_2(classes))), num_warps=4,
        )  # fmt: skip
    common = {
        "D": width, "HEAD": head, "CHUNKS": chunks, "IMAGE": kinds[2], "TEXT": kinds[0], "RATIONAL": kinds[1],
        "WIDE": _is_wide(keys.dtype, head, tile), "MATRIX": matrix,
        "BLOCK_D": tile.columns, "BLOCK_C": _depth(keys.dtype, head),
        "BLOCK_S": max(256, min(512, triton.next_power_of_2(classes))),
        "PRECISION": default_precision(keys.dtype, precision),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    class_attention_backward_queries_kernel[(batch * num_heads * groups * (tiles + kinds[2]),)](
        image, text, rational, keys, values, dattended, attended.image, attended.logsums, attended.image_logsums,
        attended.totals, deltas, made.q_image, made.q_text, made.q_rational, image_pairs, dattended_sum,
        batch, classes, tiles, per_text, scale, share,
        HEAD_VECTOR=vector, BLOCK_Q=tile.queries, BLOCK_K=tile.keys, **common,
        # The image query's two accumulators of 64 x 64 spill on Blackwell.
        BLOCK_I=max(1, min(32, 4096 // vector)),
    )  # fmt: skip
    # Keys' tiles are as high as queries' tiles, so that either pass reads what the other owns in short strips.
    key_tiles = cdiv(classes, tile.queries)
    class_attention_backward_keys_kernel[(batch * num_heads * groups * key_tiles,)](
        image, text, rational, keys, values, dattended, attended.logsums, attended.totals, deltas,
        image_pairs, dattended_sum, made.keys, made.values,
        batch, classes, key_tiles, per_text, scale, share,
        BLOCK_Q=tile.keys, BLOCK_K=tile.queries, **common,
    )  # fmt: skip
    return made
