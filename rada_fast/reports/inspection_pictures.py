"""The pictures of an inspection, as PNG files drawn without a display.

Their colours are those of Okabe and Ito, which people with any kind of colour blindness can tell apart, and diverging
ones from orange to purple and from blue to red. What colours say is also said by a shape or a place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rada_fast.reports.inspection import NEAR, WORDS, Inspection, change_of_class, mask_statistics
from rada_fast.reports.pictures import MASK_COLOURS, RATIONAL_COLOURS
from rada_fast.reports.projection import Projection

BEFORE, AFTER, GAINED, LOST = "#7f7f7f", "#0072B2", "#009E73", "#D55E00"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
MARKERS = "os^Dv"
NAMED_CLASSES = len(COLOURS) * len(MARKERS)
"""So many classes have a colour and a marker of their own in a projection."""
MOST_ROWS = 12
"""A heat map of one image has no more classes than these, the most probable ones."""
MOST_CLASSES = 40
"""The picture of the classes has no more rows than these, and so has the heat map of their means."""

AT_LEFT: dict[str, Any] = {"x": 0.01, "horizontalalignment": "left"}
"""The place of the title of a wide picture, of which a phone shows the left side first."""


def write_pictures(inspection: Inspection, write: Callable[[str, Callable[[Path], object]], object]) -> None:
    """Draw all pictures of an inspection. write: takes the name of a file and a function that writes it to a path."""
    for name, draw in (
        ("mask.png", mask_histogram),
        ("heat-maps.png", heat_maps),
        ("class-averages.png", class_averages),
        ("projection.png", projections),
        ("classes.png", classes),
        ("reliability.png", reliability),
    ):
        write(name, partial(_save, draw(inspection)))


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # A class may have a name in letters that matplotlib's own font lacks, which it draws as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


def shown_name(name: object, length: int = 30) -> str:
    """Return a name as matplotlib shows it: not as a formula, on one line, and cut where it is long.

    matplotlib refuses bytes of a file's name that are not UTF-8, so that they are shown as escape sequences.
    """
    text = " ".join(str(name).encode("utf-8", "backslashreplace").decode().split())
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


def mask_histogram(inspection: Inspection) -> Figure:
    """Draw how often each value of the mask occurs."""
    mask = inspection.matrices.mask
    facts = mask_statistics(mask)
    low, high = min(facts["min"], 0.5), max(facts["max"], 1.5)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    counts, edges = np.histogram(mask.flatten().numpy(), bins=120, range=(low, high))
    axes.axvspan(1 - NEAR, 1 + NEAR, color=COLOURS[1], alpha=0.25, label=f"within {NEAR:g} of 1")
    axes.stairs(counts / facts["values"] * 100, edges, fill=True, color=AFTER)
    axes.axvline(1, color="black", linewidth=1, label="1: CLIP unchanged")
    axes.axvline(facts["mean"], color=LOST, linewidth=1.5, linestyle="--", label=f"mean {facts['mean']:.3f}")
    axes.set_xlabel("value of the mask M")
    axes.set_ylabel("share of all elements in a bar, %")
    axes.set_title(
        f"Mask values of {facts['images']} image{'s' if facts['images'] > 1 else ''}: "
        f"standard deviation {facts['std']:.3f}, from {facts['min']:.2f} to {facts['max']:.2f}"
    )
    axes.legend(frameon=False)
    return figure


def heat_maps(inspection: Inspection) -> Figure:
    """Draw M, R and M * R of the chosen images, with a row for each of their most probable classes."""
    shown, matrices = inspection.shown, inspection.matrices
    rows = min(MOST_ROWS, len(matrices.mask[0]))
    figure = Figure(figsize=(15, 0.8 + len(shown) * (1.5 + 0.2 * rows)), layout="constrained")
    figure.suptitle("Mask M, rational matrix R and M∘R of single images", **AT_LEFT)
    for index, part in zip(shown, figure.subfigures(len(shown), 1, squeeze=False)[:, 0], strict=True):
        before, after = matrices.before(index), matrices.after(index)
        probable = [(inspection.logit_scale * one.sum(dim=-1)).softmax(dim=-1) for one in (before, after)]
        order = (probable[0] + probable[1]).argsort(descending=True, stable=True)[:rows]
        label = int(matrices.labels[index])
        guesses = [shown_name(inspection.class_names[int(one.argmax())]) for one in probable]
        part.suptitle(
            f"{shown_name(matrices.ids[index], 60)}: is {shown_name(inspection.class_names[label])}, "
            f"zero-shot {guesses[0]}, adapted {guesses[1]}",
            fontsize=10,
            **AT_LEFT,
        )
        names = [
            ("▸ " if k == label else "") + shown_name(inspection.class_names[k]) + f"  {a:.0%} → {b:.0%}"
            for k, a, b in zip(order.tolist(), *(one[order].tolist() for one in probable), strict=True)
        ]
        _three_maps(part, matrices.mask[index][order], before[order], after[order], names)
    return figure


def class_averages(inspection: Inspection) -> Figure:
    """Draw the means of M, R and M * R over the images of each class, in the row of the class itself."""
    rows = inspection.classes()
    most = sorted(rows, key=lambda row: (-abs(change_of_class(row)), row["label"]))
    present = set(inspection.matrices.labels.tolist())
    classes = sorted([row["label"] for row in most if row["label"] in present][:MOST_CLASSES])
    figure = Figure(figsize=(15, 1.8 + 0.22 * len(classes)), layout="constrained")
    kind = averaged_classes(len(classes), len(present), len(rows))
    figure.suptitle(f"Means over the images of each class, in the row of their own class: {kind}", **AT_LEFT)
    names = [shown_name(inspection.class_names[label]) for label in classes]
    _three_maps(figure, *inspection.matrices.class_means(classes), names)
    return figure


def averaged_classes(shown: int, masked: int, tested: int) -> str:
    """Return words for the classes that the picture of the means shows.

    shown: how many classes it shows; masked: how many have an image whose mask was computed; tested: how many have an
    image at all.
    """
    if shown < masked:
        return f"the {shown} classes that change most"
    return (
        "all classes" if masked == tested else f"the {masked} classes of {tested} with images whose masks were computed"
    )


def _three_maps(figure: Any, mask: Tensor, before: Tensor, after: Tensor, names: Sequence[str]) -> None:
    """Draw M, R and M * R side by side, (rows, D) each; the last two have the same scale."""
    spread = max(float(np.quantile(np.abs(mask.numpy() - 1), 0.995)), 0.01)
    reach = max(float(np.quantile(np.abs(np.stack([before.numpy(), after.numpy()])), 0.995)), 1e-9)
    panels = (
        ("mask M (1: unchanged)", mask, MASK_COLOURS, 1 - spread, 1 + spread),
        ("R (zero-shot)", before, RATIONAL_COLOURS, -reach, reach),
        ("M∘R (adapted)", after, RATIONAL_COLOURS, -reach, reach),
    )
    for place, (axes, panel) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels, strict=True)):
        title, matrix, colours, low, high = panel
        drawn = axes.imshow(matrix.numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("dimension of the embedding", fontsize=8)
        axes.tick_params(labelsize=7)
        if place == 0:
            axes.set_yticks(range(len(names)), names)
        else:
            axes.tick_params(left=False)
        bar = figure.colorbar(
            drawn, ax=axes, extend="both", extendfrac=0.03, aspect=30 if len(names) <= MOST_ROWS else 60, pad=0.02
        )
        bar.ax.tick_params(labelsize=7)
        bar.ax.ticklabel_format(useOffset=False)


def projections(inspection: Inspection) -> Figure:
    """Draw R and M * R of images as points of a plane."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    labels = inspection.matrices.labels.numpy()
    numbers, counts = np.unique(labels, return_counts=True)
    by_size = sorted(zip(-counts, numbers, strict=True))
    named = sorted(int(label) for _, label in by_size[:NAMED_CLASSES])
    titles = ("R (zero-shot)", "M∘R (adapted)")
    for axes, title, one in zip(figure.subplots(1, 2), titles, inspection.projections, strict=True):
        _points(axes, one, labels, named, inspection.class_names)
        same = "" if one.same_class is None else f"\nnearest image is of the same class: {one.same_class:.1%}"
        axes.set_title(title + same)
    figure.suptitle(f"{len(labels)} images by {inspection.projections[0].method}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), fontsize=8, frameon=False)
    return figure


def _points(axes: Axes, one: Projection, labels: np.ndarray, named: Sequence[int], names: Sequence[str]) -> None:
    """Draw the points of one projection; those of classes without a colour of their own are grey."""
    others = ~np.isin(labels, named)
    if others.any():
        across, up = one.points[others].T
        axes.scatter(across, up, s=8, color="#bbbbbb", label="other classes")
    for place, label in enumerate(named):
        across, up = one.points[labels == label].T
        axes.scatter(
            across, up, s=22, color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place // len(COLOURS) % len(MARKERS)], edgecolors="white", linewidths=0.4,
            label=shown_name(names[label]),
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def classes(inspection: Inspection) -> Figure:
    """Draw the accuracy of every class before and after adaptation, the classes that have gained most at the top."""
    changes = {row["label"]: row["adapted_top1"] - row["zero_shot_top1"] for row in inspection.classes()}
    most = sorted(inspection.classes(), key=lambda row: (-abs(changes[row["label"]]), row["label"]))
    left_out = max(0, len(most) - MOST_CLASSES)
    rows = sorted(most[:MOST_CLASSES], key=lambda row: (changes[row["label"]], -row["label"]))
    figure = Figure(figsize=(8.5, 1.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    before, after = (np.array([row[f"{name}_top1"] for row in rows]) for name in ("zero_shot", "adapted"))
    for colour, which, word in ((GAINED, after > before, "gain"), (LOST, after < before, "loss")):
        axes.hlines(places[which], before[which], after[which], color=colour, linewidth=3, alpha=0.7, label=word)
    axes.scatter(before, places, s=46, facecolors="white", edgecolors=BEFORE, linewidths=1.5, label=WORDS[0], zorder=3)
    axes.scatter(after, places, s=24, color=AFTER, label=WORDS[1], zorder=4)
    axes.set_yticks(places, [f"{shown_name(row['name'])} ({row['images']})" for row in rows], fontsize=8)
    axes.set_xlim(-3, 103)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlabel("accuracy, % (in brackets: images of the class)")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    more = f"Accuracy of the {len(rows)} classes that change most ({left_out} others are left out)"
    axes.set_title(more if left_out else "Accuracy of each class")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def reliability(inspection: Inspection) -> Figure:
    """Draw the accuracy of the answers against their confidence, before and after adaptation."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    measures = inspection.measures()
    panels = zip(
        figure.subplots(1, 2, sharey=True), inspection.bins(), WORDS, ("zero_shot", "adapted"), (BEFORE, AFTER),
        strict=True,
    )  # fmt: skip
    for axes, bins, word, name, colour in panels:
        full = [one for one in bins if one.confidence is not None and one.accuracy is not None]
        most = max((one.answers for one in full), default=1)
        for one in full:
            assert one.confidence is not None
            assert one.accuracy is not None
            # The more answers a bin has, the fuller is its colour.
            shade = 0.3 + 0.7 * (one.answers / most) ** 0.5
            width = one.high - one.low
            axes.bar(one.low, one.accuracy, width, align="edge", color=colour, alpha=shade, edgecolor="white")
            axes.plot([one.confidence] * 2, [one.confidence, one.accuracy], color=LOST, linewidth=2)
            axes.plot(one.confidence, one.accuracy, "o", color="black", markersize=3)
        axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="as sure as right")
        axes.plot([], [], color=LOST, linewidth=2, label="distance that the error counts")
        error = measures[f"{name}_ece"]
        axes.set_title(f"{word}: calibration error {'-' if error is None else f'{error:.2f} %'}")
        axes.set_xlabel("confidence of the answer")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.legend(frameon=False, loc="upper left", fontsize=8)
    figure.axes[0].set_ylabel("share of right answers")
    figure.suptitle("Reliability: fuller bars have more answers")
    return figure
