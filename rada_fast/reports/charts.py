"""Draw charts of measurements to files, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


class StageBar(NamedTuple):
    """A piece of a bar of stages_picture.

    row: the bar that it belongs to.
    stage: the name of the stage, which decides the colour.
    ms: its milliseconds, which are the length of the piece.
    floor_ms: the least milliseconds that the machine allows, or None where they are not known.
    whole: whether the piece is a bar of its own, and not one of the stages that are put end to end.
    """

    row: str
    stage: str
    ms: float
    floor_ms: float | None
    whole: bool


def stages_picture(path: Path, *, title: str, bars: Sequence[StageBar]) -> None:
    """Draw a horizontal bar for each row, made of its stages end to end, and write it as a PNG.

    The floor of each piece is drawn as a hatched part of it.
    """
    rows = list(dict.fromkeys((f"{bar.row}\n{bar.stage}" if bar.whole else bar.row) for bar in bars))
    stages = list(dict.fromkeys(bar.stage for bar in bars))
    colours = {stage: f"C{index % 10}" for index, stage in enumerate(stages)}
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(rows)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    ends = dict.fromkeys(rows, 0.0)
    labelled: set[str] = set()
    for bar in bars:
        row = f"{bar.row}\n{bar.stage}" if bar.whole else bar.row
        label = bar.stage if bar.stage not in labelled else None
        labelled.add(bar.stage)
        place = len(rows) - 1 - rows.index(row)
        axes.barh(place, bar.ms, 0.7, left=ends[row], color=colours[bar.stage], label=label)
        if bar.floor_ms is not None:
            floor = min(bar.floor_ms, bar.ms)
            axes.barh(place, floor, 0.7, left=ends[row], fill=False, hatch="///", edgecolor="white", linewidth=0)
        ends[row] += bar.ms
    for row, end in ends.items():
        axes.text(end, len(rows) - 1 - rows.index(row), f" {end:.4g} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), rows[::-1], fontsize=8)
    axes.set_xlim(0, 1.15 * max(ends.values()))
    axes.set_xlabel("median milliseconds of one call; hatched: the floor that the machine's measured limits allow")
    figure.legend(loc="outside lower center", ncols=min(4, len(stages)), fontsize=8)
    figure.savefig(path, dpi=110)


class CostRow(NamedTuple):
    """A row of costs_picture.

    group: the rows that have the same scale and colour; method: the name of the method.
    frames: frames per second; memory: GiB, or None where it is not known; multiply_adds: billions in one forward pass.
    """

    group: str
    method: str
    frames: float
    memory: float | None
    multiply_adds: float


def costs_picture(path: Path, *, title: str, rows: Sequence[CostRow]) -> None:
    """Draw the speed, the memory and the operations of methods side by side, and write the picture as a PNG.

    The axes are logarithmic, because the methods differ by orders of magnitude.
    """
    groups = list(dict.fromkeys(row.group for row in rows))
    ordered = [row for group in groups for row in rows if row.group == group]
    panels: dict[str, list[float | None]] = {
        "frames per second": [row.frames for row in ordered],
        "peak memory, GiB": [row.memory for row in ordered],
        "GMAC of one forward pass of one image": [row.multiply_adds for row in ordered],
    }
    figure = Figure(figsize=(14, 1.8 + 0.34 * len(ordered)), layout="constrained")
    figure.suptitle(title)
    for column, (axes, (label, values)) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True)
    ):
        axes.set_xscale("log")
        known = [value for value in values if value]
        for place, (row, value) in enumerate(zip(ordered, values, strict=True)):
            if value:
                axes.barh(place, value, 0.7, color=f"C{groups.index(row.group) % 10}")
                axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
        if known:
            axes.set_xlim(min(known) / 2, max(known) * 3)
        axes.set_xlabel(label)
        if column == 0:
            axes.set_yticks(range(len(ordered)), [f"{row.group}: {row.method}" for row in ordered], fontsize=8)
            axes.invert_yaxis()
    figure.savefig(path, dpi=110)


MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
"""The marker of a point, by the type of its numbers."""


class RooflinePoint(NamedTuple):
    """An operator in roofline_chart.

    panel: the panel in which it stands; name: its name, which decides the colour; label: its sizes; dtype: its type.
    intensity: operations for each byte; rate: 10^9 operations per second.
    """

    panel: str
    name: str
    label: str
    dtype: str
    intensity: float
    rate: float


class Roof(NamedTuple):
    """What a machine can do at most.

    rates: 10^9 operations per second in matrix products, by the type of the numbers.
    memory, caches: 10^9 bytes per second of the main memory, and of caches or None where that is not known.
    """

    rates: Mapping[str, float]
    memory: float
    caches: float | None


def roofline_chart(
    path: Path, *, title: str, roof: Roof, points: Sequence[RooflinePoint], notes: Sequence[str]
) -> None:
    """Draw operations per second over operations per byte, both logarithmic, and write the chart as a PNG.

    Lines show the limits of the machine. There is a panel for each kind of operator.

    notes: sentences below the panels.
    """
    panels = list(dict.fromkeys(point.panel for point in points))
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6.2 * columns, 5.2 * rows + 0.3 * len(notes)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _roofline_panel(axes, panel, roof, [point for point in points if point.panel == panel])
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    markers = ", ".join(f"{_MARKER_NAMES[MARKERS[dtype]]} {dtype}" for dtype in roof.rates if dtype in MARKERS)
    figure.supxlabel("\n".join([f"operations for each byte ({markers})", *notes]), fontsize=10)
    figure.supylabel("10^9 operations per second")
    figure.savefig(path, dpi=110)


_MARKER_NAMES = {"o": "circles:", "s": "squares:", "^": "triangles:"}


def _plain_logarithmic(axes: Axes) -> None:
    """Label logarithmic axes with plain numbers, at the powers of ten and, where there are few, between them."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _reach(values: Sequence[float], around: float) -> tuple[float, float]:
    """Return limits of a logarithmic axis around values, which show one power of ten at the least."""
    low, high = min(values) / around, max(values) * around
    missing = max(1.0, 20 / (high / low)) ** 0.5
    return low / missing, high * missing


def _roofline_panel(axes: Axes, panel: str, roof: Roof, points: Sequence[RooflinePoint]) -> None:
    low, high = _reach([point.intensity for point in points], 3)
    dtypes = [dtype for dtype in roof.rates if any(point.dtype == dtype for point in points)]
    peak = max(roof.rates.values())
    for style, bandwidth, name in (("-", roof.memory, "memory"), ("--", roof.caches, "caches")):
        if bandwidth is not None:
            ends = [low, min(high, peak / bandwidth)]
            if ends[1] > low:
                axes.plot(ends, [bandwidth * end for end in ends], style, color="gray", linewidth=1)
                axes.annotate(
                    f"{name} {bandwidth:.0f} GB/s", (low, bandwidth * low), textcoords="offset points",
                    xytext=(2, 4), fontsize=7, color="gray",
                )  # fmt: skip
    for dtype in dtypes or list(roof.rates):
        rate = roof.rates[dtype]
        axes.plot([max(low, rate / (roof.caches or roof.memory)), high], [rate, rate], color="gray", linewidth=1)
        axes.annotate(
            f"{dtype} {rate:.0f}", (high, rate), textcoords="offset points", xytext=(-2, 3), fontsize=7, color="gray",
            ha="right",
        )  # fmt: skip
    names = list(dict.fromkeys(point.name for point in points))
    for index, name in enumerate(names):
        own = [point for point in points if point.name == name]
        for dtype in dict.fromkeys(point.dtype for point in own):
            chosen = [point for point in own if point.dtype == dtype]
            axes.plot(
                [point.intensity for point in chosen], [point.rate for point in chosen], MARKERS.get(dtype, "D"),
                color=f"C{index % 10}", markersize=5, alpha=0.8, linestyle="none",
                label=name if dtype == own[0].dtype else None,
            )  # fmt: skip
    # The sizes stand at the fastest operator of each size and type, above it or, where others stand, below it.
    placed: list[tuple[float, float]] = []
    for label, dtype in dict.fromkeys((point.label, point.dtype) for point in points):
        best = max(
            (point for point in points if (point.label, point.dtype) == (label, dtype)), key=lambda one: one.rate
        )
        place = (log10(best.intensity / low) / log10(high / low), log10(best.rate))
        near = any(abs(place[0] - x) < 0.12 and abs(place[1] - y) < 0.1 for x, y in placed)
        placed.append(place)
        axes.annotate(
            label, (best.intensity, best.rate), textcoords="offset points", xytext=(4, -9 if near else 3), fontsize=6,
            rotation=-20 if near else 20,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(*_reach([*(point.rate for point in points), peak], 2))
    _plain_logarithmic(axes)
    axes.set_title(panel, fontsize=10)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7)


LINES = ("-", "--", ":", "-.")
"""The kinds of lines."""


class GrowthSeries(NamedTuple):
    """A line of growth_chart: values over sizes, in ascending order.

    provider: what is measured, which decides the colour; work: what it does, which decides the kind of the line.
    exponent: that of its growth, or None if it is not known.
    """

    provider: str
    work: str
    sizes: Sequence[float]
    values: Sequence[float]
    exponent: float | None


class GrowthPanel(NamedTuple):
    """A panel of growth_chart: the labels of its axes, and its lines."""

    across: str
    along: str
    series: Sequence[GrowthSeries]


def growth_chart(path: Path, *, title: str, columns: int, panels: Sequence[GrowthPanel], notes: Sequence[str]) -> None:
    """Draw how values grow with sizes, with logarithmic axes, and write the chart as a PNG.

    columns: the number of panels in a row; notes: sentences below the panels.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.6 * rows + 0.6 + 0.18 * len(notes)), layout="constrained")
    figure.suptitle(title)
    providers, works = (
        list(dict.fromkeys(getattr(series, name) for panel in panels for series in panel.series))
        for name in ("provider", "work")
    )
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flatten(), panels, strict=False):
        shown: list[float] = []
        for series in panel.series:
            pairs = [(size, value) for size, value in zip(series.sizes, series.values, strict=True) if value > 0]
            if pairs:
                grows = "" if series.exponent is None else f", power {series.exponent:.2f}"
                axes.plot(
                    *zip(*pairs, strict=True),
                    LINES[works.index(series.work) % len(LINES)],
                    marker="o",
                    markersize=4,
                    color=f"C{providers.index(series.provider) % 10}",
                    label=f"{series.provider} {series.work}{grows}",
                )
                shown += [value for _, value in pairs]
        axes.set_xscale("log")
        axes.set_yscale("log")
        if shown:
            axes.set_ylim(*_reach(shown, 1.5))
        _plain_logarithmic(axes)
        sizes = sorted({size for series in panel.series for size in series.sizes})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=7, rotation=30)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.along)
        axes.grid(which="both", alpha=0.2)
        if shown:
            axes.legend(fontsize=7)
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=8)
    figure.savefig(path, dpi=110)
