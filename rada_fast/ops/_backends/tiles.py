"""Measure tiles on a device, store the fastest on disk, and use them in place of those in the kernels' tables.

`rada-fast kernels --tune` measures them; a call only looks them up. There is one file for each device and version of
Triton. It holds the fastest of at most ten tiles for each launch and range of sizes. With RADA_FAST_TILES=table the
files are not read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton

from rada_fast import _env
from rada_fast.errors import UserError
from rada_fast.kernels import class_attention, masked_logits, parameter_gradients, projection_tiles
from rada_fast.kernels._shared_memory import A100, Target

TILES: dict[str, Any] = {
    "rational_projections_forward": projection_tiles.Tile,
    "class_attention_forward": class_attention.Tile,
    "class_attention_backward": class_attention.Tile,
    "masked_logits_forward": masked_logits.Tile,
    "masked_logits_backward": masked_logits.Tile,
    "parameter_gradients": parameter_gradients.Tile,
}
MIN_GAIN = 1.02
"""The ratio of times from which a tile replaces the table's; it is larger than a measurement's noise."""


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes and types on which the choice of a tile depends. `rows` are those of one episode.

    dtype: the type of the products. Of `classes` and `rows` only the number of binary digits counts.
    features, weights: the types in which they lie in memory, under autocast others than dtype; None takes dtype.
    """

    dtype: torch.dtype
    classes: int
    rows: int
    width: int
    head: int
    precision: str = "ieee"
    features: torch.dtype | None = None
    weights: torch.dtype | None = None

    def key(self, launch: str) -> str:
        stored = (self.features or self.dtype, self.weights or self.dtype)
        dtype, *loaded = (str(value).removeprefix("torch.") for value in (self.dtype, *stored))
        if loaded != [dtype, dtype]:
            dtype += f"({','.join(loaded)})"
        if self.dtype == torch.float32:
            dtype += f"-{self.precision}"
        ranges = f"K{self.classes.bit_length()} rows{self.rows.bit_length()}"
        return f"{launch} {dtype} {ranges} D{self.width} d{self.head}"


def table_tile(launch: str, sizes: Sizes, target: Target = A100) -> Any:
    """Return the tile that the kernels' own table chooses for a target."""
    match launch:
        case "rational_projections_forward":
            return projection_tiles.tile_of(
                sizes.dtype, sizes.rows, sizes.classes, sizes.width, sizes.precision,
                features=sizes.features, weights=sizes.weights, target=target,
            )  # fmt: skip
        case "class_attention_forward" | "class_attention_backward":
            return class_attention.tile_of(
                sizes.dtype, sizes.classes, sizes.head, images=sizes.rows // sizes.classes,
                backward=launch.endswith("backward"), precision=sizes.precision, target=target,
            )  # fmt: skip
        case "masked_logits_forward" | "masked_logits_backward":
            return masked_logits.tile_of(
                sizes.dtype, sizes.rows, sizes.width,
                backward=launch.endswith("backward"), weights=sizes.weights, target=target,
            )  # fmt: skip
        case "parameter_gradients":
            return parameter_gradients.tile_of(
                sizes.dtype, sizes.width, sizes.precision, features=sizes.features, target=target
            )
    raise ValueError(f"launch must be one of {', '.join(TILES)}, got {launch!r}")


def shared_bytes(launch: str, tile: Any, sizes: Sizes, target: Target) -> int:
    """Return an upper bound of the shared memory that a launch needs with a tile."""
    features, weights = sizes.features or sizes.dtype, sizes.weights or sizes.dtype
    match launch:
        case "rational_projections_forward":
            return projection_tiles.shared_bytes(tile, sizes.dtype, sizes.classes, features, weights, target)
        case "class_attention_forward" | "class_attention_backward":
            backward = launch.endswith("backward")
            return class_attention.shared_bytes(tile, sizes.dtype, sizes.head, backward=backward, target=target)
        case "masked_logits_forward" | "masked_logits_backward":
            return masked_logits.shared_bytes(tile, sizes.dtype, weights, target)
        case "parameter_gradients":
            return parameter_gradients.shared_bytes(tile, sizes.dtype, features, target)
    raise ValueError(f"launch must be one of {', '.join(TILES)}, got {launch!r}")


def candidates(launch: str, sizes: Sizes, target: Target = A100) -> Iterator[Any]:
    """Yield the table's tile, then tiles with other warps or stages, and with half or twice the rows, that fit."""
    base = table_tile(launch, sizes, target)
    extent = "outputs" if launch == "parameter_gradients" else "queries" if "attention" in launch else "rows"
    whole, other = getattr(base, extent), 12 - base.warps
    yield base
    for size, warps, stages in (
        (whole, base.warps, base.stages + 1), (whole, base.warps, base.stages - 1), (whole, other, base.stages),
        (whole // 2, base.warps, base.stages), (whole // 2, other, base.stages), (whole // 2, 4, base.stages + 1),
        (2 * whole, base.warps, base.stages), (2 * whole, other, base.stages), (2 * whole, 8, base.stages - 1),
    ):  # fmt: skip
        if 16 <= size <= 128 and stages >= 1 and (extent != "outputs" or sizes.width % size == 0):
            tile = replace(base, **{extent: size}, warps=warps, stages=stages)
            if shared_bytes(launch, tile, sizes, target) <= target.block_bytes:
                yield tile


def cache_file(device: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    return _env.cache_dir() / "tiles" / f"{name}-triton{triton.__version__}.json"


@cache
def _measured(path: Path) -> dict[str, Any]:
    """Return the tiles in a file; none where the file does not exist or has another form."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: TILES[key.split()[0]](
                **{field.name: int(value[field.name]) for field in fields(TILES[key.split()[0]])}
            )
            for key, value in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@cache
def _chosen(device: int, launch: str, sizes: Sizes) -> Any | None:
    if _env.tiles_from_table():
        return None
    return _measured(cache_file(_env.cuda_device_name(device))).get(sizes.key(launch))


def chosen_tile(device: torch.device, launch: str, sizes: Sizes) -> Any | None:
    """Return the tile that was measured for such sizes on this device, or None. A process reads the disk once."""
    if device.type != "cuda":
        return None
    return _chosen(device.index if device.index is not None else _env.current_cuda_device(), launch, sizes)


@lru_cache(maxsize=1024)
def _all_chosen(device: int, *sizes: Any) -> dict[str, Any]:
    return {launch: _chosen(device, launch, Sizes(*sizes)) for launch in TILES}


def chosen_tiles(device: torch.device, *sizes: Any) -> dict[str, Any]:
    """Return chosen_tile of every launch by name; a launch without one may be missing. sizes: the fields of Sizes."""
    if device.type != "cuda":
        return {}
    return _all_chosen(device.index if device.index is not None else _env.current_cuda_device(), *sizes)


def forget() -> None:
    """Read the files again at the next call."""
    _measured.cache_clear()
    _chosen.cache_clear()
    _all_chosen.cache_clear()


def tune(
    launches: dict[str, Callable[[Any], Any]],
    sizes: Sizes,
    device: str,
    measure: Callable[[Callable[[], Any]], float],
    echo: Callable[[str], None] = print,
    target: Target = A100,
) -> dict[str, dict[str, Any]]:
    """Measure the candidates of every launch and write those that beat the table to the device's file.

    launches: a function for each launch by name, which runs the launch with a tile.
    sizes: the sizes for which the tiles are stored.
    device: the device's name, which names the file.
    measure: takes a function and returns the time of a call, in any unit.
    echo: called with a line of text after each launch.
    target: the device's target, which the table's tiles fit.

    Returns for each launch the table's tile, the fastest one and the ratio of their times. Raises UserError while a
    CUDA graph is being captured.
    """
    if _env.is_capturing():
        raise UserError("tiles cannot be tuned while a CUDA graph is being captured")
    path = cache_file(device)
    kept = {key: asdict(value) for key, value in _measured(path).items()}
    report: dict[str, dict[str, Any]] = {}
    for launch, run in launches.items():
        times: list[tuple[float, Any]] = []
        for tile in candidates(launch, sizes, target):
            try:
                times.append((measure(partial(run, tile)), tile))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
                if not times:
                    raise
        base, fastest = times[0], min(times, key=lambda pair: pair[0])
        ratio = base[0] / fastest[0] if fastest[0] else 1.0
        key = sizes.key(launch)
        kept.pop(key, None)
        if ratio > MIN_GAIN:
            kept[key] = asdict(fastest[1])
        report[launch] = {"table": asdict(base[1]), "fastest": asdict(fastest[1]), "ratio": ratio, "tried": len(times)}
        echo(f"{launch}: {len(times)} tiles, the fastest {ratio:.2f} times the table's speed")
        # The file is written after every launch, so a run that is stopped keeps its results.
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(path)
    forget()
    return report
