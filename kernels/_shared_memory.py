"""Choose tiles whose operands fit into the shared memory that a device has for one block.

Triton keeps the operands of a loop in shared memory. With S pipeline stages it stages S - 1 copies of all that one step
loads, in the type that lies in memory: under autocast, a weight in float32 takes four bytes an element although the
product is in bfloat16. Beside them lie operands in the type of the products, where the loaded ones cannot be used as
they are. So a launch needs

    (S - 1) (bytes that a step loads) + (bytes of operands in the type of the products),

or what its end needs to bring its results into the order in which they are stored, where that is more. The tables count
by this formula. tests/kernels/test_shared_memory.py compares it with what Triton asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from rada_fast import _env

BLOCK_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""The KiB of shared memory that one block may have, for each compute capability (CUDA C++ Programming Guide)."""

MIN_EXTENT = 16
"""The smallest extent of a product on tensor cores."""


class Target(NamedTuple):
    """Hold the compute capability that code is made for, 80 for sm_80, and a block's bytes of shared memory."""

    capability: int
    block_bytes: int

    @classmethod
    def of_capability(cls, capability: int, block_bytes: int | None = None) -> Target:
        """Return the target of devices with this compute capability, whose code may be the A100's (RADA_FAST_TARGET).

        block_bytes: None takes what all devices with this compute capability have.
        """
        block_bytes = block_bytes or 1024 * BLOCK_KIB[capability]
        return cls(80 if _env.triton_target() else capability, block_bytes)

    @property
    def keeps_operands(self) -> bool:
        """Return whether products run beside the program and read their operands from shared memory until they end.

        This holds for Hopper's wgmma and the tcgen05 of B200. Consumer Blackwell, sm_120, has the A100's mma.
        """
        return 90 <= self.capability < 120

    @property
    def is_hopper(self) -> bool:
        """Return whether the tables hold tiles that were measured on such a device, an H100."""
        return self.capability == 90

    @property
    def is_b200(self) -> bool:
        """Return whether the code is that of B200 and B300."""
        return self.capability in (100, 103)


A100 = Target.of_capability(80)

_assumed = A100


@contextmanager
def assumed_target(target: Target) -> Iterator[None]:
    """Open a block in which launches on CPU tensors, which are only compiled or simulated, take tiles for a target."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


def target_of(device: torch.device) -> Target:
    """Return the target of a tensor's device. For the CPU, where simulators execute the A100's code, it is the A100."""
    if device.type != "cuda":
        return _assumed
    return _cuda_target(_env.current_cuda_device() if device.index is None else device.index)


@cache
def _cuda_target(index: int) -> Target:
    major, minor = _env.cuda_device_capability(index)
    return Target.of_capability(10 * major + minor, _env.cuda_block_memory(index) - _withheld.get(index, 0))


_withheld: dict[int, int] = {}
"""The bytes of each CUDA device that withhold has taken."""


def withhold(device: torch.device, count: int) -> bool:
    """Leave so many bytes of a device's shared memory unused in all later launches, and return whether that helps.

    Another version of Triton may need more than the formula says. It does not help on the CPU, nor where less than half
    of the memory would be left.
    """
    target = target_of(device)
    if device.type != "cuda" or count <= 0:
        return False
    index = _env.current_cuda_device() if device.index is None else device.index
    if 2 * (target.block_bytes - count) < _env.cuda_block_memory(index):
        return False
    _withheld[index] = _withheld.get(index, 0) + count
    _cuda_target.cache_clear()
    return True


def operand_bytes(
    target: Target,
    dtype: torch.dtype,
    left: int,
    right: int,
    *,
    left_computed: bool = False,
    right_converted: bool = False,
) -> int:
    """Return the bytes of a product's operands beside their staged copies.

    dtype: the type of the product.
    left, right: how many elements the operands have.
    left_computed: whether the left one is computed from tiles and vectors, which threads hold in different layouts.
    right_converted: whether the right one is loaded in another type.
    """
    if dtype == torch.float32:
        # Three TF32 products split each operand into two.
        return 2 * (left + right) * dtype.itemsize
    if target.keeps_operands:
        # A computed operand has two copies where the right one is used as it was loaded. 1 KiB is for barriers.
        return (left * (2 if left_computed and not right_converted else 1) + right) * dtype.itemsize + 1024
    return left * dtype.itemsize if left_computed else 0


def smaller_tiles(tile: Any, extents: tuple[str, ...]) -> Iterator[Any]:
    """Yield a tile, then smaller ones: first with fewer pipeline stages, but at least two, then with smaller extents.

    extents: the names of the extents in the order in which they are halved, each as often as possible.
    """
    yield tile
    while tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
        yield tile
    for extent in extents:
        while getattr(tile, extent) > MIN_EXTENT:
            tile = replace(tile, **{extent: getattr(tile, extent) // 2})
            yield tile


def first_fitting(tile: Any, extents: tuple[str, ...], shared_bytes: Callable[[Any], int], target: Target) -> Any:
    """Return the first of smaller_tiles that fits into a block's shared memory, or the last one if none does."""
    for smaller in smaller_tiles(tile, extents):
        tile = smaller
        if shared_bytes(tile) <= target.block_bytes:
            break
    return tile
