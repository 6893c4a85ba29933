"""The parts of a data set: training, validation and test images."""

from __future__ import annotations

from typing import Literal

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


def split_part(path: str) -> tuple[str, Part | None]:
    """Split PATH@PART, where the part is train, val or test, into the two. Without a part, the second is None."""
    above, at, part = path.rpartition("@")
    for known in PARTS:
        if at and above and part == known:
            return above, known
    return path, None
