"""Pictures of the effect of an adapter and of the times of stages, drawn to files without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

MASK_COLOURS, RATIONAL_COLOURS = "PuOr", "RdBu_r"


def mask_picture(
    path: Path,
    *,
    image: np.ndarray[Any, Any],
    title: str,
    mask: Tensor,
    rational: Tensor,
    class_names: tuple[str, ...],
    logit_scale: float,
    histogram: Tensor,
) -> None:
    """Draw the mask M, the rational matrix R and M * R of one image as heat maps, and a histogram of mask values.

    The picture corresponds to Figures 4 and 5 of the paper and is written as a PNG.

    path: the file to write.
    image: the image, (height, width, 3) uint8.
    title: the title of the picture.
    mask: M of the image, (K, D).
    rational: R of the image, (K, D).
    class_names: the names of the K classes.
    logit_scale: the multiplier s.
    histogram: the mask values of many images, in any shape.
    """
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["picture", "histogram", "answer"], ["M", "R", "MR"]], height_ratios=[1, 1.6])

    axes["picture"].imshow(image, interpolation="nearest")
    axes["picture"].set_axis_off()

    values = histogram.flatten().numpy()
    axes["histogram"].hist(values, bins=100, color="tab:purple")
    axes["histogram"].axvline(1, color="black", linewidth=1)
    axes["histogram"].set_yscale("log")
    axes["histogram"].set_xlabel("mask value (1 leaves CLIP unchanged)")
    axes["histogram"].set_ylabel("elements")
    axes["histogram"].set_title(f"mask: mean {values.mean():.3f}, from {values.min():.2f} to {values.max():.2f}")

    before, after = ((logit_scale * matrix.sum(dim=-1)).softmax(dim=-1) for matrix in (rational, mask * rational))
    best = (before + after).argsort(descending=True)[:6].flip(0)
    places = np.arange(len(best))
    axes["answer"].barh(places + 0.2, before[best].numpy(), 0.4, label="zero-shot", color="tab:gray")
    axes["answer"].barh(places - 0.2, after[best].numpy(), 0.4, label="adapted", color="tab:purple")
    axes["answer"].set_yticks(places, [class_names[index] for index in best.tolist()], fontsize=8)
    axes["answer"].set_xlabel("probability")
    axes["answer"].set_xlim(0, 1)
    axes["answer"].legend(loc="lower right")

    spread = max(float((mask - 1).abs().quantile(0.995)), 1e-6)
    reach = max(float(rational.abs().quantile(0.995)), 1e-6)
    panels = {
        "M": ("M", mask, MASK_COLOURS, (1 - spread, 1 + spread)),
        "R": ("R", rational, RATIONAL_COLOURS, (-reach, reach)),
        "MR": ("M * R", mask * rational, RATIONAL_COLOURS, (-reach, reach)),
    }
    for name, (label, matrix, colours, (low, high)) in panels.items():
        shown = axes[name].imshow(
            matrix.numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
        )
        axes[name].set_title(label)
        axes[name].set_xlabel("feature")
        if name == "M":
            axes[name].set_yticks(range(len(class_names)), class_names, fontsize=7)
        else:
            axes[name].set_yticks([])
        figure.colorbar(shown, ax=axes[name])
    figure.savefig(path, dpi=110)


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
