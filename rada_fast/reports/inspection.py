"""The numbers of an inspection: how masks are distributed, and what an adapter has changed, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rada_fast.reports.measures import CalibrationBin, calibration_bins
from rada_fast.reports.projection import Projection
from rada_fast.reports.results import Evaluation
from rada_fast.reports.tables import Row, class_rows, measures_of

NEAR = 0.1
"""A mask value within this distance of 0 or 1 counts as near to it."""
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
WORDS = ("zero-shot", "adapted")
"""The words for what was there before and after adaptation."""


@dataclass(frozen=True)
class Matrices:
    """The rational matrices and masks of some images, on the CPU.

    ids: the names of the N images; labels: their classes (N,).
    rational: their features f (N, D) and those of the classes T (K, D), before anything was trained.
    adapted: the same features as the trained encoders and classifier give them. They are equal to those before where
        nothing but the adapter was trained.
    mask: the masks M (N, K, D).
    """

    ids: tuple[str, ...]
    labels: Tensor
    rational: tuple[Tensor, Tensor]
    adapted: tuple[Tensor, Tensor]
    mask: Tensor

    def before(self, index: int) -> Tensor:
        """Return R of one image, (K, D)."""
        image, text = self.rational
        return image[index] * text

    def after(self, index: int) -> Tensor:
        """Return M * R of one image, (K, D)."""
        image, text = self.adapted
        return self.mask[index] * image[index] * text

    def class_means(self, classes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means of M, R and M * R over the images of each class, in the row of that class, as (C, D)."""
        means = []
        for label in classes:
            own = (self.labels == label).nonzero().flatten().tolist()
            masks = torch.stack([self.mask[index, label] for index in own])
            before = torch.stack([self.rational[0][index] * self.rational[1][label] for index in own])
            after = masks * torch.stack([self.adapted[0][index] * self.adapted[1][label] for index in own])
            means.append((masks.mean(dim=0), before.mean(dim=0), after.mean(dim=0)))
        masks, before, after = (torch.stack(list(part)) for part in zip(*means, strict=True))
        return masks, before, after


@dataclass(frozen=True)
class Inspection:
    """Everything that the pictures and the page of an inspection show.

    evaluation: the answers about all images.
    matrices: the matrices of some of the images; logit_scale: the multiplier s.
    projections: R and M * R as points of a plane.
    shown: the indices of the images whose heat maps are drawn.
    class_names: the names of all classes.
    """

    evaluation: Evaluation
    matrices: Matrices
    logit_scale: float
    projections: tuple[Projection, Projection]
    shown: tuple[int, ...]
    class_names: tuple[str, ...]

    def measures(self) -> Row:
        """Return the accuracies, calibration errors and flips over all images; see measures_of."""
        return measures_of(self.evaluation)

    def classes(self) -> list[Row]:
        """Return a row for every class with images; see class_rows."""
        return class_rows([self.evaluation])

    def bins(self) -> tuple[list[CalibrationBin], list[CalibrationBin]]:
        """Return the bins of the reliability diagram before and after adaptation."""
        known = [one for one in self.evaluation.answers if one.confidence is not None]
        before = calibration_bins((one.confidence[0], one.right_before) for one in known if one.confidence)
        after = calibration_bins((one.confidence[1], one.right_after) for one in known if one.confidence)
        return before, after

    def numbers(self) -> dict[str, Any]:
        """Return all numbers as plain values, for inspect.json."""
        points = {
            name: {"method": one.method, "nearest_is_of_same_class": one.same_class, "points": one.points.tolist()}
            for name, one in zip(("R", "MR"), self.projections, strict=True)
        }
        reliability = dict(zip(WORDS, ([one._asdict() for one in bins] for bins in self.bins()), strict=True))
        return {
            "data": self.evaluation.data,
            "measures": self.measures(),
            "mask": mask_statistics(self.matrices.mask),
            "classes": [{key: value for key, value in row.items() if key in CLASS_COLUMNS} for row in self.classes()],
            "reliability": {name.replace("-", "_"): bins for name, bins in reliability.items()},
            "images": [
                {"id": id, "label": label}
                for id, label in zip(self.matrices.ids, self.matrices.labels.tolist(), strict=True)
            ],
            "projection": points,
            "shown": [self.matrices.ids[index] for index in self.shown],
        }


CLASS_COLUMNS = (
    "label", "name", "images", "zero_shot_top1", "adapted_top1", "wrong_to_right", "right_to_wrong", "taken_for",
)  # fmt: skip
"""The columns of class_rows that belong to an inspection."""


def mask_statistics(mask: Tensor) -> dict[str, Any]:
    """Return how the values of masks are distributed; the shares are from 0 to 1.

    mask: the masks of images, (N, K, D).
    """
    values = mask.flatten().numpy()
    of_quantiles = np.quantile(values, QUANTILES)
    return {
        "images": len(mask),
        "values": values.size,
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {str(at): float(value) for at, value in zip(QUANTILES, of_quantiles, strict=True)},
        "share_near_0": float((np.abs(values) <= NEAR).mean()),
        "share_near_1": float((np.abs(values - 1) <= NEAR).mean()),
        "share_below_0": float((values < 0).mean()),
    }


def change_of_class(row: Row) -> int:
    """Return by how many images a class has gained by adaptation; a negative number says how many it has lost."""
    return round(row["wrong_to_right"] - row["right_to_wrong"])
