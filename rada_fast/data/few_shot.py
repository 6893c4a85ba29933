"""The choice of few training images of each class, and the halves of base and new classes."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rada_fast.data.pickled_split import read_pickled_split
from rada_fast.errors import UserError
from rada_fast.system import notices

MOST_VALIDATION_SHOTS = 4
"""CoOp draws as many validation images of each class as training images, but no more than these."""


def choose_by_hash(labels: Sequence[int], ids: Sequence[str], shots: int, seed: int) -> list[int]:
    """Return the indices of at most `shots` items of each class, those with the smallest hashes, in their order."""
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for index, (label, id) in enumerate(zip(labels, ids, strict=True)):
        rank = hashlib.sha256(os.fsencode(f"{seed} shot {id}")).digest()
        by_class.setdefault(label, []).append((rank, index))
    return sorted(index for group in by_class.values() for _, index in sorted(group)[:shots])


def take_in_turn(labels: Sequence[int], count: int) -> list[int]:
    """Return the indices of at most `count` items, taken in turn from every class, in their order."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    ranked = sorted((rank, index) for group in by_class.values() for rank, index in enumerate(group))
    return sorted(index for _, index in ranked[:count])


def base_and_new(num_classes: int) -> tuple[list[int], list[int]]:
    """Return the labels of the base classes, which are the first half rounded up, and those of the new classes."""
    middle = (num_classes + 1) // 2
    return list(range(middle)), list(range(middle, num_classes))


STORED_CHOICES = "split_fewshot"
"""The folder in which CoOp leaves its choices."""


class ListedImage(Protocol):
    """An image of a published list."""

    @property
    def id(self) -> str:
        """The name of the image, which is the end of its path."""

    @property
    def label(self) -> int:
        """The number of its class."""


@dataclass(frozen=True)
class PublishedShots:
    """The few-shot choice of CoOp and its successors, which depends on the order of a published list.

    train, val: the listed images, in the order of the list.
    part: the part to choose from: "train" or "val".
    folder: the folder of the data set. If CoOp has left its choice there, in split_fewshot, this choice is taken.
    order: a pickled list of all training images in the order in which CoOp found them, or None. If the file exists, its
        order is taken instead of that of `train`.
    """

    train: Sequence[ListedImage]
    val: Sequence[ListedImage]
    part: str
    folder: Path
    order: Path | None = None

    def choose(self, shots: int, seed: int) -> list[str]:
        """Return the ids of at most `shots` images of each class, as CoOp chooses them.

        Raises UserError if a pickled list does not fit the images.
        """
        stored = self.folder / STORED_CHOICES / f"shot_{shots}-seed_{seed}.pkl"
        if stored.is_file():
            notices.note(f"the {shots} {self.part} images of each class are those that {stored} lists")
            return self.listed_in(stored)
        return self.drawn(shots, seed)

    def listed_in(self, path: Path) -> list[str]:
        """Return the ids of the images that a pickled choice lists. Raises UserError if it does not fit the images."""
        return [image.id for image in self._read(path, self.part)]

    def drawn(self, shots: int, seed: int) -> list[str]:
        """Return the ids of the images that CoOp draws where it has stored no choice."""
        train: Sequence[ListedImage] = self.train
        if self.order is not None and self.order.is_file():
            train = self._read(self.order, "train")
        generator = random.Random(seed)
        # The validation images are drawn after the training images, from the same random numbers.
        chosen = {
            "train": draw_by_class(train, shots, generator),
            "val": draw_by_class(self.val, min(shots, MOST_VALIDATION_SHOTS), generator),
        }
        return [image.id for image in chosen[self.part]]

    def _read(self, path: Path, part: str) -> list[ListedImage]:
        """Read a part of a pickled list. Its paths are those of another machine; their ends are looked up here."""
        images = read_pickled_split(path).get(part)
        if images is None:
            raise UserError(f"few-shot split {path} must have a part {part!r}")
        listed = {image.id: image for image in (self.val if part == "val" else self.train)}
        found = []
        for image in images:
            own = _ending(image.path, listed)
            if own is None:
                raise UserError(
                    f"few-shot split {path} lists {image.path!r}, which is not among the {len(listed)} images of "
                    f"{part} in {self.folder}; move the file away to draw the images from the seed"
                )
            if own.label != image.label:
                raise UserError(
                    f"few-shot split {path} gives {image.path!r} the label {image.label}, the data set {own.label}"
                )
            found.append(own)
        return found


def draw_by_class(images: Sequence[ListedImage], shots: int, generator: random.Random) -> list[ListedImage]:
    """Draw `shots` images of each class, or take all where there are fewer, as Dassl's generate_fewshot_dataset does.

    The classes are visited in the order in which the list first names them, and each draw continues the same stream of
    random numbers. Both decide which images are drawn.
    """
    by_class: dict[int, list[ListedImage]] = {}
    for image in images:
        by_class.setdefault(image.label, []).append(image)
    chosen = []
    for group in by_class.values():
        chosen += generator.sample(group, shots) if len(group) >= shots else group
    return chosen


def _ending(path: str, known: dict[str, ListedImage]) -> ListedImage | None:
    """Return the known image whose id is the longest possible ending of a path, or None."""
    parts = path.replace("\\", "/").split("/")
    endings = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((known[ending] for ending in endings if ending in known), None)
