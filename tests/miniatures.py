"""Write small data sets in the layouts that researchers have on disk."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rada_fast.data.published import CoopSet, coop_set
from tests.pictures import write_picture

CLASSES = ("banded", "big_dog", "2 stars", "owl", "cat")
"""Five classes, whose first three are CoOp's base classes. CoOp names a class with an underscore and with a number."""
PARTS = {"train": 6, "val": 5, "test": 2}
"""The numbers of images of each class."""

Rows = dict[str, list[list[Any]]]


def coop_rows(classes: tuple[str, ...] = CLASSES) -> Rows:
    """Return the lists of a split file. As in CoOp's own, the labels of the training images come in no order."""
    order = [*range(1, len(classes)), 0]
    return {
        part: [[f"{classes[k]}/{part}_{i:03}.jpg", k, classes[k]] for k in order for i in range(count)]
        for part, count in PARTS.items()
    }


def write_coop(root: Path, name: str, folder: str | None = None, images: str | None = None) -> Path:
    """Write a data set of CoOp with its split file.

    root: the folder of all data sets.
    name: the name of the set.
    folder, images: the names of its folder and of the folder of its images, or None for CoOp's.

    Returns the folder of the set.
    """
    known = coop_set(name)
    assert isinstance(known, CoopSet)
    path = root / (known.folders[0] if folder is None else folder)
    below = path / (known.images[0] if images is None else images)
    rows = coop_rows()
    if known.name == "FGVCAircraft":
        write_aircraft(path)
        return path
    for part in rows.values():
        for image, label, _ in part:
            write_picture(below / image, (40 * label, 0, 0), size=2)
    (path / known.split_file).write_text(json.dumps(rows))
    return path


def write_aircraft(path: Path) -> None:
    """Write FGVC Aircraft, which has text files in place of a split file."""
    classes = ("707-320", "A300B4", "DC-10 30")
    for part, count in PARTS.items():
        lines = []
        for label, name in enumerate(classes):
            for index in range(count):
                number = f"{label}{index}{len(part)}"
                write_picture(path / "images" / f"{number}.jpg", size=2)
                lines.append(f"{number} {name}")
        (path / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (path / "variants.txt").write_text("\n".join(classes) + "\n")


def write_class_tree(root: Path, counts: Mapping[str, int]) -> Path:
    """Write empty picture files into class folders. They suffice where nothing is decoded."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.JPEG").touch()
    return root


@contextmanager
def dassl() -> Iterator[Callable[..., Any]]:
    """Provide a class Datum where CoOp's pickles have it, so that tests can write such pickles."""
    names = ("dassl", "dassl.data", "dassl.data.datasets", "dassl.data.datasets.base_dataset")
    modules = {name: ModuleType(name) for name in names}

    class Datum:
        def __init__(self, path: str, label: int, name: str) -> None:
            self._impath, self._label, self._domain, self._classname = path, label, 0, name

    Datum.__module__, Datum.__qualname__ = names[-1], "Datum"
    modules[names[-1]].Datum = Datum  # type: ignore[attr-defined]
    assert not set(names) & set(sys.modules)
    sys.modules.update(modules)
    try:
        yield Datum
    finally:
        for name in names:
            del sys.modules[name]


def write_pickled_split(path: Path, parts: Mapping[str, list[list[Any]]], root: str, protocol: int = 4) -> Path:
    """Write lists of images as CoOp pickles them, with absolute paths below a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with dassl() as datum:
        value = {part: [datum(f"{root}/{row[0]}", *row[1:]) for row in rows] for part, rows in parts.items()}
        path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path
