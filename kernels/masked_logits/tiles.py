"""The sizes of the tiles that programs of the masked logits work on, and of the chunks of columns they sum over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rada_fast.kernels._common import block_of

CHUNK = 32
"""The number of columns that one part of a logit is summed over; a block of columns holds whole chunks."""
PEAK_CHUNK = 8
"""The number of columns that share one candidate for the linf penalty's peak. A chunk wider than one tensor-core tile
would span several warps, and each of them would then need the peak."""

PENALTIES = {"none": 0, "l2": 1, "l1": 2, "linf": 3}


@dataclass(frozen=True)
class Tile:
    """Rows, columns and reduction of a product's tile; warps; pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, rows: int, width: int, head: int, *, backward: bool = False) -> Tile:
    """The tile for a problem, from a table. rows: of one episode, n K.

    A step of the reduction stays inside a head, whose columns share one factor.
    """
    if dtype == torch.float32:
        # Short reductions and one stage, as in class_attention.
        return Tile(64, block_of(width, 64), 16, 4, 1)
    depth = max(16, block_of(head, 64))
    if rows <= 512:
        return Tile(64, block_of(width, 32), depth, 4, 3)
    if backward:
        # With eight warps Blackwell leaves 128 registers for a thread, and the mask's gradient spills; hence four. With
        # heads of 128 it would spill there on 64 columns even so.
        return Tile(64, block_of(width, 32 if head > 96 else 64), depth, 4, 3)
    # With four warps the end, where A and R are in registers at once, spills; hence eight.
    return Tile(128, block_of(width, 64), depth, 8, 3)
