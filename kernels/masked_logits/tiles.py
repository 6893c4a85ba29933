"""The sizes of the tiles on which the programs of the masked logits work, and of the chunks of columns they sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rada_fast.kernels._common import block_of

CHUNK = 32
"""The number of columns whose sum is one part of a logit; a block of columns holds whole chunks."""
PEAK_CHUNK = 8
"""The number of columns that share one candidate for the linf penalty's largest element. A chunk wider than one tile of
the tensor cores would span several warps, and each of them would then need the chunk's largest element."""
MIN_ROWS = 16
"""The fewest rows that a tile may have, the least that tensor cores multiply."""

PENALTIES = {"none": 0, "l2": 1, "l1": 2, "linf": 3}


@dataclass(frozen=True)
class Tile:
    """Hold the rows, columns and depth (reduction) of a product's tile, and the warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, rows: int, width: int, head: int, *, backward: bool = False) -> Tile:
    """Return the tile for a problem, from a table. rows: the rows of one episode, n images times K classes.

    A step of the reduction stays inside a head, whose columns share one factor.
    """
    if dtype == torch.float32:
        # Reductions are short and there is one stage, as in class_attention.
        return Tile(64, block_of(width, 64), 16, 4, 1)
    depth = max(16, block_of(head, 64))
    if rows <= 512:
        return Tile(64, block_of(width, 32), depth, 4, 3)
    if backward:
        # With eight warps Blackwell leaves 128 registers for a thread, and the mask's gradient spills; hence four. For
        # heads of 128, it would still spill there with 64 columns.
        return Tile(64, block_of(width, 32 if head > 96 else 64), depth, 4, 3)
    # With four warps the end of the kernel spills, where A and R are in registers at once; hence eight.
    return Tile(128, block_of(width, 64), depth, 8, 3)
