"""The sizes of the tiles on which the programs of the attention over classes work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from rada_fast.kernels._common import block_of, default_precision
from rada_fast.kernels._shared_memory import A100, Target, first_fitting


@dataclass(frozen=True)
class Tile:
    """Hold the queries and keys of a tile, the output columns of a program, and the warps and pipeline stages."""

    queries: int
    keys: int
    columns: int
    warps: int
    stages: int


def tile_of(
    dtype: torch.dtype,
    classes: int,
    head: int,
    *,
    images: int | None = None,
    backward: bool = False,
    precision: str = "ieee",
    target: Target = A100,
) -> Tile:
    """Return the tile for a problem: the table's, or a smaller one where that does not fit the target.

    images: the images of one episode, which count in the forward pass only; None stands for many.
    """
    if target.is_hopper:
        few_rows = images is not None and images * classes <= 512
        tile = _hopper_table(dtype, classes, head, few_rows, backward, precision)
    else:
        tile = _table(dtype, classes, head, backward, precision)
    return first_fitting(
        tile,
        ("keys", "queries"),
        lambda tile: shared_bytes(tile, dtype, head, backward=backward, target=target),
        target,
    )


def shared_bytes(tile: Tile, dtype: torch.dtype, head: int, *, backward: bool, target: Target) -> int:
    """Return an upper bound of the shared memory that a launch needs, for all query kinds; see _shared_memory.py.

    In float32 it holds for every precision.
    """
    split, piece = splits_head(dtype, head, tile, "ieee"), piece_columns(dtype, head)
    queries, keys, scores = tile.queries * tile.columns, tile.keys * tile.columns, tile.queries * tile.keys
    pieces = (tile.queries + tile.keys) * piece
    # For each pass over the classes, the elements that a step loads, and those that stay beside them. In the pass that
    # computes the keys' gradients the two extents change their roles.
    if dtype == torch.float32:
        # Only the operands of two products are there at once, and three TF32 products split each into two.
        passes = [(2 * pieces, 2 * (pieces + scores + keys))]
        if products_of(dtype, head, "tf32x3", target) == "bf16x6":
            # Three parts in bfloat16 take one and a half times the bytes of their matrix.
            passes += [(2 * keys, 3 * ((3 if backward else 2) * queries + 2 * keys) // 2)]
            passes += [(3 * keys, 3 * (2 * queries + 3 * keys) // 2)] if backward else []
    elif not backward:
        passes = [((tile.queries * piece + pieces), scores + keys) if split else (2 * keys, 2 * queries + scores)]
    elif split:
        passes = [(pieces, 2 * scores + keys), (pieces, 2 * scores + 3 * keys)]
    else:
        passes = [(2 * keys, 3 * queries + 2 * scores), (3 * keys, 2 * queries + 2 * scores)]
    # A head in pieces has an inner loop, and what that loads is converted beside the staged copies.
    copies = tile.stages - 1 + (dtype != torch.float32 and (split or target.keeps_operands))
    largest = max(copies * loaded + kept for loaded, kept in passes)
    return max(largest, queries) * dtype.itemsize + (1024 if target.keeps_operands else 0)


def _hopper_table(dtype: torch.dtype, classes: int, head: int, few_rows: bool, backward: bool, precision: str) -> Tile:
    """Return the tile that was the fastest on an H100, with heads of 64 (docs/measurements.md).

    The tiles for bfloat16 products of float32 are those that benchmarks/device_model.py prefers.
    """
    if head > 64 or (dtype == torch.float32 and (precision == "ieee" or (precision == "tf32" and head < 32))):
        return _table(dtype, classes, head, backward, precision)
    columns = max(16, triton.next_power_of_2(head))
    if products_of(dtype, head, precision, Target.of_capability(90)) == "bf16x6":
        if classes <= 64 or (few_rows and not backward):
            return Tile(16, 32, columns, 4, 2)
        # With steps of 32 queries the programs that own keys spill.
        return Tile(64, 16 if backward else 32, columns, 4, 2)
    if dtype == torch.float32:
        # Fewer queries make more programs. With more than 64 classes the backward pass has enough of them, because its
        # one launch has programs for the queries and programs for the keys.
        if backward and classes <= 64:
            return Tile(16, 64, 64, 8, 1)
        if not backward and (classes <= 64 or few_rows):
            return Tile(16, 32, columns, 4, 1)
        return Tile(64, 32, columns, 4, 1)
    if classes <= 64:
        # Fewer queries than 64 occupy more multiprocessors.
        return Tile(16, 64, columns, 4, 2)
    return Tile(64, 32 if classes <= 256 or backward else 64, columns, 4, 3)


def _table(dtype: torch.dtype, classes: int, head: int, backward: bool, precision: str) -> Tile:
    """Return the tile for the A100's registers, of which a thread has at most 255."""
    split = head > 128
    columns = min(max(16, triton.next_power_of_2(head)), 128)
    if dtype == torch.float32:
        # Products without tensor cores keep all of both operands in registers, and a product of three TF32 products
        # keeps each operand three times. Reductions are therefore short. There is one stage, since more would send the
        # operands through shared memory.
        if precision == "ieee":
            if backward and 64 < head < 128:
                # With 64 columns and eight warps these heads spill up to 156 bytes.
                return Tile(32, 16, 32, 4, 1)
            return Tile(32, 16 if backward else 32, min(columns, 64), 8 if head > 64 else 4, 1)
        # Eight warps lie side by side here and four lie one above the other: with other tiles several warps would
        # compute the same products.
        return Tile(16, 64, 64, 8, 1) if backward else Tile(64, 16, 32, 4, 1)
    if backward and split:
        # The output is wider than high, so eight warps lie side by side. A head's last piece may need a mask.
        return Tile(32, 32, 64, 8, 2)
    if backward and head > 64:
        # dk and dv of 64 x 128 spill. Scores are wider than high, so their warps lie side by side. On 32 x 32 eight
        # warps would share two strips of 16 rows and compute each product four times.
        return Tile(32, 64, columns, 8, 2)
    if split:
        # Two accumulators of 64 x 128 take 128 registers of a thread with four warps; eight halve that.
        return Tile(64, 32, columns, 8, 2)
    if head > 64:
        # Each of eight warps has a strip of 16 rows. Heads of 128 take all 255 registers on sm_80. Triton 3.8 spills
        # none of them there. Triton 3.6 spills 148 bytes, and in a step of the loop a warp reads 7 words of them back
        # beside its 128 products. No other tile is free of spills in both and computes each score once: 128 x 16 spills
        # 40 bytes, and 64 x 32 with four warps 152 or more. Two groups of 64 columns compute every score twice, and so
        # do eight warps on 64 x 32. With 64 x 64 Triton 3.8 spills 16 bytes, keys and values are read twice as often,
        # and the sums of a row cross warps. On sm_86 and sm_89 Triton 3.8 spills 156 bytes, and 32 with 128 x 16; on
        # sm_120 it spills 16.
        return Tile(128, 32, columns, 8, 2)
    if classes <= 256 or backward:
        # The last block of keys is rarely full: 200 classes are 7 blocks of 32 keys, and 4 blocks of 64 would be 28 %
        # more. In the backward pass two accumulators and three score tiles of 64 x 64 spill, and eight warps on 64 x 32
        # compute every product twice.
        return Tile(64, 32, columns, 4, 2)
    return Tile(128, 64, columns, 8, 2)


def products_of(dtype: torch.dtype, head: int, precision: str, target: Target) -> str:
    """Return the precision of the attention's products; see _common.default_precision.

    A wide head is read in pieces, which would be divided into parts at each use. It keeps its TF32 products.
    """
    return default_precision(dtype, precision, target if head <= 64 else A100)


def splits_head(dtype: torch.dtype, head: int, tile: Tile, products: str) -> bool:
    """Return whether scores are computed over a head in pieces. products: their precision, see products_of.

    In float32 they always are but with bfloat16 products; see tile_of.
    """
    return head > tile.columns or (dtype == torch.float32 and products != "bf16x6")


def piece_columns(dtype: torch.dtype, head: int) -> int:
    """Return the number of columns of a piece of a split head."""
    return 16 if dtype == torch.float32 else max(16, block_of(head, 64))
