"""Write picture files of one colour, for tests that need files but do not care what they show."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def write_picture(path: Path, colour: tuple[int, int, int] = (0, 0, 0), size: int = 64) -> Path:
    """Write a square PNG picture of one colour, whatever the suffix of its path, and make its folder first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, "PNG")
    return path


def write_class_folders(root: Path, classes: Iterable[str], each: int = 1) -> Path:
    """Write a folder of pictures for each class: CLASS/0.png and so on, all of different colours."""
    for label, name in enumerate(classes):
        for index in range(each):
            write_picture(root / name / f"{index}.png", (80 * label, 9, 60 * index))
    return root
