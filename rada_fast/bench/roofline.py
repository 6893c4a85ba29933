"""Compare every operator of this package with the least time that the machine's measured limits allow.

Each operator is a stage of a setting, which is one set of sizes. Its work is what any program must compute, read and
write: operations by a formula, and the bytes of its inputs and results, each counted once. Its floor is the greater of
operations / product rate and bytes / bandwidth. The bandwidth is that of the fastest way to go through as many bytes,
by reading, changing or copying them, because an operator that is called again and again finds small data in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rada_fast.bench import roofline_adapter, roofline_operators
from rada_fast.bench.partial import PartialFigures, measured_in_turn
from rada_fast.bench.report import Presentation, giga, limits_of, percent, picture_title, significant, sizes_name
from rada_fast.bench.roofline_operators import Group
from rada_fast.bench.stages import CACHE_LIMIT, MEMORY_LIMIT, Figure, Setting, Stage, measure
from rada_fast.config.bench_limits import BenchRooflineOptions
from rada_fast.ops import use_backend


def figures(
    options: BenchRooflineOptions, device: torch.device, partial_figures: PartialFigures
) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each group of operators, at each of its sizes."""
    chosen = [group for group in groups(options, device) if not options.only or group.operator in options.only]
    settings = {name_of(group): partial(measured, group, options, device) for group in chosen}
    assert len(settings) == len(chosen), "two groups have one name"
    return measured_in_turn("bench roofline", settings, partial_figures)


def groups(options: BenchRooflineOptions, device: torch.device) -> Iterator[Group]:
    """Yield all operators at the sizes of the options. Their inputs are drawn later."""
    yield from roofline_adapter.adapters(options, device)
    yield from roofline_adapter.episodes(options, device)
    yield from roofline_operators.selections(options, device)
    yield from roofline_operators.losses(options, device)
    yield from roofline_operators.optimizers(options, device)
    yield from roofline_operators.views(options, device)
    yield from roofline_operators.attentions(options, device)
    yield from roofline_operators.small_transformers(options, device)


def name_of(group: Group) -> str:
    """Return the name of the setting of a group of operators."""
    parts = (group.operator, group.label, sizes_name(group.sizes))
    return ", ".join(part for part in parts if part)


def backend_of(group: Group, options: BenchRooflineOptions, device: torch.device) -> str:
    """Return the backend that is to serve a group of operators, by name, so that none falls back to another."""
    if options.backend == "reference":
        return "reference"
    if device.type == "cpu" or group.kind == "host":
        return "cpu"
    return "triton" if group.kind == "adapter" else "cuda"


def measured(group: Group, options: BenchRooflineOptions, device: torch.device) -> list[Figure]:
    """Measure the operators of a group in turn, and return their lines of figures."""
    backend = backend_of(group, options, device)
    with use_backend(backend):
        setting = setting_of(group, backend)
        place = "cpu" if group.kind == "host" else device.type
        return measure(setting, place, options.measuring)


def setting_of(group: Group, backend: str) -> Setting:
    """Draw the inputs of a group of operators, and try each of them once."""
    stages, refusals = [], {}
    for candidate in group.candidates:
        try:
            call = candidate.make()
            call()
        except (RuntimeError, MemoryError) as error:
            refusals[candidate.name] = reason_of(error, backend)
            continue
        stages.append(
            Stage(
                name=candidate.name,
                inside=candidate.inside,
                call=call,
                pictures=1,
                work=(candidate.work,),
            )
        )
    return Setting(name=name_of(group), sizes=group.sizes, stages=tuple(stages), caches=True, refusals=refusals)


def reason_of(error: BaseException, backend: str) -> str:
    """Return in one line why an operator cannot be measured."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if backend in lines[0] else f"backend {backend!r}: {lines[0]}"


COLUMNS: dict[str, Callable[[Figure], str]] = {
    "stage": lambda figure: figure["name"],
    "MFLOP": lambda figure: mega(figure["operations_per_picture"]),
    "MB": lambda figure: mega(figure["bytes_per_picture"]),
    "FLOP/byte": lambda figure: significant(figure["intensity"]),
    "floor ms": lambda figure: significant(figure["floor_ms"]),
    "best ms": lambda figure: significant(figure["best"]),
    "median": lambda figure: significant(figure["median"]),
    "floor %": lambda figure: percent(figure["share_of_floor"]),
    "bound": lambda figure: bound_of(figure),
    "GFLOP/s": lambda figure: giga(rate_of(figure)),
    "GB/s": lambda figure: giga(1e3 * figure["bytes_per_picture"] / figure["best"]),
    "extra MiB": lambda figure: significant(figure["extra_mib"]),
}
"""The columns of the table of a setting, and what stands in them for an operator's line of figures."""
LEGEND = (
    "MFLOP: millions of operations by the formula, those of matrix products, or of additions, multiplications, "
    "comparisons and exponentials where there are none; MB: inputs and results, each counted once; floor: operations / "
    "product rate or bytes / bandwidth, whichever is more, where the bandwidth is that of the fastest way through a "
    "buffer of as many bytes, in caches or not; floor %: the floor over the best time, which is the share of the "
    "possible speed; bound: which of the two the floor is; extra MiB: the peak memory during a call beyond what was in "
    "use before it"
)


def mega(value: float | None) -> str:
    """Return a number in millions, or an empty text for None."""
    return "" if value is None else significant(value / 1e6)


def rate_of(figure: Figure) -> float | None:
    """Return the operations per second of the best time, or None for an operator without operations."""
    operations = figure["operations_per_picture"]
    return None if operations is None else 1e3 * float(operations) / float(figure["best"])


def bound_of(figure: Figure) -> str:
    """Return which limit of the machine the floor is: that of operations or that of bytes."""
    return "operations" if (figure["share_of_peak"] or 0.0) >= (figure["share_of_bandwidth"] or 0.0) else "bytes"


def draw(path: Path, part: str, figures: Sequence[Figure], facts: dict[str, Any]) -> None:
    """Draw the chart: a panel for each kind of operator, with the machine's limits as lines."""
    from rada_fast.reports.charts import Roof, RooflinePoint, roofline_chart

    points = [
        RooflinePoint(
            panel_of(figure), figure["name"], shape_of(figure), figure["precision"] or "float32", figure["intensity"],
            rate / 1e9,
        )
        for figure in figures
        if figure["kind"] == "stage" and figure["intensity"] and (rate := rate_of(figure))
    ]  # fmt: skip
    limits = {name: max(values) for (name, _), values in limits_of(figures).items()}
    rates: dict[str, float] = {}
    for name, best in limits.items():
        dtype, _, library = name.partition(" products by ")
        if library:
            rates[dtype] = max(best, rates.get(dtype, 0.0))
    left_out = dict.fromkeys(
        figure["name"] for figure in figures if figure["kind"] == "stage" and not figure["intensity"]
    )
    refused = dict.fromkeys(figure["name"] for figure in figures if figure["kind"] == "refusal")
    notes = [f"without operations, so in the table only: {', '.join(left_out)}"] if left_out else []
    notes += [f"not measured here: {', '.join(refused)}"] if refused else []
    dtypes = ", ".join(dict.fromkeys(point.dtype for point in points))
    roof = Roof(rates, limits.get(MEMORY_LIMIT, 0.0), limits.get(CACHE_LIMIT))
    roofline_chart(path, title=f"{picture_title(part, facts)}, {dtypes}", roof=roof, points=points, notes=notes)


def panel_of(figure: Figure) -> str:
    """Return the panel of the chart to which an operator belongs."""
    operator = str(figure["setting"]).partition(", ")[0]
    if operator != "adapter":
        return operator
    return "adapter, forward" if str(figure["name"]).partition(",")[0] == "forward" else "adapter, forward and backward"


def shape_of(figure: Figure) -> str:
    """Return the sizes of an operator in few characters: those that differ within a panel."""
    letters = {"episodes": "E", "batch": "B", "classes": "K"}
    # The batch of episodes follows from their number.
    names = [name for name in letters if figure[name] and not (name == "batch" and figure["episodes"])]
    return " ".join(f"{letters[name]}{figure[name]}" for name in names)


PRESENTATION = Presentation(COLUMNS, LEGEND, draw)
