"""The sizes of the tiles on which the programs of the projections and of their backward pass work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rada_fast.kernels._common import block_of
from rada_fast.kernels._shared_memory import A100, Target, first_fitting, operand_bytes


@dataclass(frozen=True)
class Tile:
    """Hold the rows, columns and depth (reduction) of a product's tile, the rows of the image query's tile, and the
    warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    image_rows: int
    warps: int
    stages: int


def tile_of(
    dtype: torch.dtype,
    rows: int,
    classes: int,
    width: int,
    precision: str = "ieee",
    *,
    features: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    target: Target = A100,
) -> Tile:
    """Return the tile for a problem: the table's, or a smaller one where that does not fit the target.

    rows: the rows of one episode, n images times K classes.
    features, weights: the types in which they lie in memory; None takes dtype.
    """
    features, weights = features or dtype, weights or dtype
    table = _hopper_table if target.is_hopper else _table
    return first_fitting(
        table(dtype, rows, width, precision, features),
        ("depth", "rows"),
        lambda tile: shared_bytes(tile, dtype, classes, features, weights, target),
        target,
    )


def shared_bytes(
    tile: Tile, dtype: torch.dtype, classes: int, features: torch.dtype, weights: torch.dtype, target: Target
) -> int:
    """Return an upper bound of the shared memory that the launch needs; see _shared_memory.py."""
    left, right = tile.rows * tile.depth, tile.columns * tile.depth
    two_images = classes >= tile.rows
    loaded = right * weights.itemsize + (left + (2 * tile.depth if two_images else left)) * features.itemsize
    needed = (tile.stages - 1) * loaded
    needed += operand_bytes(target, dtype, left, right, left_computed=two_images, right_converted=weights != dtype)
    return max(needed, tile.rows * tile.columns * dtype.itemsize)


def backward_tile_of(
    dtype: torch.dtype,
    width: int,
    precision: str = "ieee",
    *,
    weights: torch.dtype | None = None,
    target: Target = A100,
) -> Tile:
    """Return the tile of the features' gradients. Its rows are classes, and those of df are images."""
    # Wider tiles spill, because two accumulators and T stay in registers.
    columns = block_of(width, 32)
    if dtype != torch.float32:
        tile = Tile(64, columns, block_of(width, 32), 16, 4, 2)
    elif precision == "ieee":
        tile = Tile(32, columns, block_of(width, 16), 16, 8, 2)
    else:
        # On sm_86 and sm_89 this spills 16 bytes. One stage or 32 rows would not, but then every load would be waited
        # for, or W would be read twice as often.
        tile = Tile(64, columns, block_of(width, 16), 16, 4, 2)
    return first_fitting(
        tile, ("depth", "rows"), lambda tile: backward_shared_bytes(tile, dtype, weights or dtype, target), target
    )


def backward_shared_bytes(tile: Tile, dtype: torch.dtype, weights: torch.dtype, target: Target) -> int:
    """Return an upper bound of the shared memory that the features' gradients need; see _shared_memory.py."""
    left, right = tile.rows * tile.depth, tile.columns * tile.depth
    # A step loads the operands of four products: of dkk, dvv, dqr and dqt.
    loaded = 4 * (left * dtype.itemsize + right * weights.itemsize)
    return (tile.stages - 1) * loaded + operand_bytes(
        target, dtype, 4 * left if target.keeps_operands else left, 4 * right if target.keeps_operands else right
    )


def _hopper_table(dtype: torch.dtype, rows: int, width: int, precision: str, features: torch.dtype) -> Tile:
    """Return the tile that was the fastest on an H100, at D = 512 (docs/measurements.md)."""
    few = rows <= 128
    if dtype == torch.float32:
        if precision == "ieee":
            return _table(dtype, rows, width, precision, features)
        if precision == "tf32":
            few = rows <= 512
            return Tile(32 if few else 64, block_of(width, 64), block_of(width, 32), 16, 4, 2 if few else 1)
        # These are the tiles that benchmarks/device_model.py prefers for bfloat16 products.
        if rows <= 512:
            return Tile(32, block_of(width, 64), block_of(width, 32), 16, 4, 2)
        return Tile(64, block_of(width, 128), block_of(width, 32), 16, 4, 2)
    # One group of four warps computes 64 rows with wgmma; eight warps or 128 rows wait longer for R.
    columns = block_of(width, 32 if few else 64 if rows <= 512 else 128)
    depth = block_of(width, 64 if features.itemsize <= 2 else 32)
    return Tile(32 if few else 64, columns, depth, 32 if columns == 32 else 16, 4, 3)


def _table(dtype: torch.dtype, rows: int, width: int, precision: str, features: torch.dtype) -> Tile:
    """Return the tile for the A100's registers and number of multiprocessors."""
    if dtype == torch.float32:
        # Reductions are short and there is one stage, as in class_attention. Without tensor cores, higher tiles pay
        # because they read less of W.
        return Tile(128 if precision == "ieee" and rows > 512 else 64, block_of(width, 64), 16, 16, 4, 1)
    if rows <= 512:
        # With few rows, smaller tiles occupy more multiprocessors and waste less in the last tile.
        return Tile(64, block_of(width, 64), block_of(width, 64), 16, 4, 3)
    # 128 x 128 is the smallest tile at which an A100's L2 keeps up with its tensor cores. Eight warps hold it in 64
    # registers of each thread, and three stages of 64 columns fill 96 KB.
    columns = block_of(width, 128)
    # R of float32 features spills with steps of 64 columns, and steps of 32 fill as many bytes.
    depth = block_of(width, 64 if features.itemsize <= 2 else 32)
    # A tile of 16 x 32 has only four tensor-core products, so with eight warps two would compute the same one.
    return Tile(128, columns, depth, 32 if columns == 32 else 16, 8, 3)
