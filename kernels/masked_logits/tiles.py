"""The sizes of the tiles on which the programs of the masked logits work, and of the chunks of columns they sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rada_fast.kernels._common import block_of
from rada_fast.kernels._shared_memory import A100, MIN_EXTENT, Target, first_fitting, operand_bytes

CHUNK = 32
"""The number of columns whose sum is one part of a logit; a block of columns holds whole chunks."""
PEAK_CHUNK = 8
"""The number of columns that share one candidate for the linf penalty's largest element. A chunk wider than one tile of
the tensor cores would span several warps, and each of them would then need the chunk's largest element."""
MIN_ROWS = MIN_EXTENT
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


def tile_of(
    dtype: torch.dtype,
    rows: int,
    width: int,
    *,
    backward: bool = False,
    weights: torch.dtype | None = None,
    target: Target = A100,
) -> Tile:
    """Return the tile for a problem: the table's, or a smaller one where that does not fit the target.

    rows: the rows of one episode, n images times K classes.
    weights: the type in which the weights lie in memory; None takes dtype.
    """
    table = _hopper_table if target.is_hopper else _table
    return first_fitting(
        table(dtype, rows, width, backward),
        ("depth", "rows"),
        lambda tile: shared_bytes(tile, dtype, weights or dtype, target),
        target,
    )


def shared_bytes(tile: Tile, dtype: torch.dtype, weights: torch.dtype, target: Target) -> int:
    """Return an upper bound of the shared memory that a launch needs; see _shared_memory.py."""
    left, right = tile.rows * tile.depth, tile.columns * tile.depth
    loaded = left * dtype.itemsize + right * weights.itemsize
    needed = (tile.stages - 1) * loaded + operand_bytes(target, dtype, left, right, right_converted=weights != dtype)
    return max(needed, 4 * tile.rows * tile.columns)


def _hopper_table(dtype: torch.dtype, rows: int, width: int, backward: bool) -> Tile:
    """Return the tile that was the fastest on an H100, at D = 512 and heads of 64 (docs/measurements.md)."""
    if dtype == torch.float32:
        depth = block_of(width, 32)
        if backward:
            return Tile(32, block_of(width, 32 if rows <= 128 else 64), depth, 4, 2)
        # With one stage 32 rows are 2 to 8 % faster and spill at widths of 256 and 1024.
        return Tile(32 if rows <= 2048 else 64, block_of(width, 64), depth, 4, 2)
    depth = block_of(width, 64)
    if rows <= 512:
        return Tile(32, block_of(width, 32 if rows <= 128 else 64), depth, 4, 3)
    return Tile(64, block_of(width, 128), depth, 8, 3)


def _table(dtype: torch.dtype, rows: int, width: int, backward: bool) -> Tile:
    """Return the tile for the A100's registers."""
    if dtype == torch.float32:
        # Reductions are short and there is one stage, as in class_attention.
        return Tile(64, block_of(width, 64), 16 if not backward else block_of(width, 32), 4, 1)
    depth = block_of(width, 64)
    if rows <= 512:
        return Tile(64, block_of(width, 32), depth, 4, 3)
    if backward:
        return Tile(64, block_of(width, 64), depth, 4, 3)
    # With four warps the end of the kernel spills, where A and R are in registers at once; hence eight.
    return Tile(128, block_of(width, 64), depth, 8, 3)
