"""Draw pictures of the effect of an adapter to files, without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
