"""Data named KIND:PATH: folders of images and files of extracted features."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.data.decode import UnreadableImageError as UnreadableImageError
from rada_fast.data.decode import read_image as read_image
from rada_fast.data.folders import (
    Found,
    Skipped,
    class_folders,
    deeper_classes,
    existing_folder,
    mention_empty,
    mention_equal_numbers,
    mention_single_class,
    mention_skipped,
    pictures_below,
)
from rada_fast.data.names import read_names as read_names
from rada_fast.errors import UserError

KINDS = {
    "imagefolder": "imagefolder:DIR (a sub-folder a class)",
    "images": "images:DIR (no labels)",
    "features": "features:FILE.npz (arrays features, labels)",
}

MOST_CLASSES = 2**20
"""A label above this is a mistake: names and text features are made for every class up to the largest."""
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SMALLEST_FEATURE = 1e-12
"""A row whose every value is below this has no direction left: torch's normalize divides by at least as much."""


@dataclass(frozen=True)
class Sample:
    """One image file.

    id: its path below the root, with forward slashes; label: its class, or -1 where it has none.
    """

    id: str
    path: Path
    label: int


@dataclass(frozen=True)
class ImageFolder:
    """Image files by class.

    folders: the class folders' names in label order; samples: all images, readable or not, sorted by id; skipped: what
    else lies there, by path and reason; fault: why its folders cannot name classes, where one of several holds all
    pictures, and those only deeper; it may still be meant to have another folder's classes.
    """

    root: Path
    folders: tuple[str, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    fault: str | None = None

    @property
    def empty_folders(self) -> tuple[str, ...]:
        """Class folders without an image, which stay classes."""
        used = {sample.label for sample in self.samples}
        return tuple(folder for label, folder in enumerate(self.folders) if label not in used)

    def subset(self, labels: Sequence[int]) -> ImageFolder:
        """Only these classes, labelled 0, 1, ... in the order given."""
        new = {label: index for index, label in enumerate(labels)}
        samples = tuple(replace(s, label=new[s.label]) for s in self.samples if s.label in new)
        return replace(self, folders=tuple(self.folders[label] for label in labels), samples=samples)

    def few_shot(self, shots: int, seed: int) -> ImageFolder:
        """At most shots images a class, drawn by (seed, id) alone."""
        kept = _few_shot([sample.label for sample in self.samples], [sample.id for sample in self.samples], shots, seed)
        return replace(self, samples=tuple(self.samples[index] for index in kept))


@dataclass(frozen=True)
class FeatureFile:
    """Extracted image features.

    features: (N, D), or (N, V, D) with the original view first, float32, as stored; labels: (N,) int64; ids: N names;
    class_names, logit_scale: names in label order, and the multiplier s of the model whose features these are, where
    the file has them.
    """

    path: Path
    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    logit_scale: float | None = None

    def normalised(self) -> Tensor:
        """The features at unit norm."""
        return normalize(self.features, dim=-1)

    def subset(self, labels: Sequence[int]) -> FeatureFile:
        """Only these classes, labelled 0, 1, ... in the order given."""
        new = {label: index for index, label in enumerate(labels)}
        kept = [index for index, label in enumerate(self.labels.tolist()) if label in new]
        names = None if self.class_names is None else tuple(self.class_names[label] for label in labels)
        chosen = self._take(kept)
        return replace(
            chosen, labels=torch.tensor([new[label] for label in chosen.labels.tolist()]).long(), class_names=names
        )

    def few_shot(self, shots: int, seed: int) -> FeatureFile:
        """At most shots rows a class, drawn by (seed, id) alone."""
        return self._take(_few_shot(self.labels.tolist(), self.ids, shots, seed))

    def _take(self, rows: list[int]) -> FeatureFile:
        ids = tuple(self.ids[row] for row in rows)
        return replace(self, features=self.features[rows], labels=self.labels[rows], ids=ids)


def _few_shot(labels: Sequence[int], ids: Sequence[str], shots: int, seed: int) -> list[int]:
    """Indices of at most shots items a class, those of the smallest hash, in the original order."""
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for index, (label, id) in enumerate(zip(labels, ids, strict=True)):
        rank = hashlib.sha256(os.fsencode(f"{seed} shot {id}")).digest()
        by_class.setdefault(label, []).append((rank, index))
    return sorted(index for group in by_class.values() for _, index in sorted(group)[:shots])


def open_source(spec: str) -> ImageFolder | FeatureFile:
    """The data behind KIND:PATH.

    Raises UserError where the kind is unknown or the path does not hold such data.
    """
    kind, _, path = spec.partition(":")
    if not path or kind not in KINDS:
        hint = ""
        if Path(spec).is_dir():
            hint = f"; did you mean imagefolder:{spec}?"
        elif Path(spec).is_file():
            hint = f"; did you mean features:{spec}?"
        raise UserError(f"data must be KIND:PATH with KIND one of {', '.join(KINDS.values())}, got {spec!r}{hint}")
    place = Path(path).expanduser()
    match kind:
        case "imagefolder":
            return open_image_folder(place)
        case "images":
            return open_flat_images(place)
        case _:
            return open_features(place)


def open_image_folder(root: Path) -> ImageFolder:
    """A folder with one sub-folder for each class, in label_order; images may lie deeper.

    Raises UserError where it holds no class, or surely others than its sub-folders; warns of what is not used.
    """
    folders, skipped = class_folders(root)
    if not folders:
        pictures = pictures_below(root, root).pictures
        hint = f"; for pictures without classes give images:{root}" if pictures else ""
        with suppress(OSError):
            above = root.absolute().parent
            if pictures and sum(path.is_dir() for path in above.iterdir()) > 1:
                hint += f", for the folders beside it as classes imagefolder:{above}"
        raise UserError(f"data folder {root} must have one sub-folder a class, it has none{hint}")
    found = [pictures_below(root / folder, root) for folder in folders]
    samples = [
        Sample(path.relative_to(root).as_posix(), path, label)
        for label, here in enumerate(found)
        for path in here.pictures
    ]
    if not samples:
        raise UserError(f"data folder {root} has {len(folders)} sub-folders but no image{_others(found)}")
    by_folder = zip(folders, found, strict=True)
    below = {
        folder: [path.relative_to(root / folder).parts for path in here.pictures]
        for folder, here in by_folder
        if here.pictures
    }
    fault = deeper_classes(root, below)
    if fault is not None:
        fault = f"data folder {root} must have one sub-folder a class, {fault}"
        if len(below) == len(folders):
            raise UserError(fault)
    skipped += tuple(entry for here in found for entry in here.skipped)
    source = ImageFolder(root, folders, tuple(sorted(samples, key=lambda sample: sample.id)), skipped, fault)
    mention_single_class(root, folders)
    mention_equal_numbers(root, folders)
    mention_empty(root, source.empty_folders)
    mention_skipped(root, skipped)
    return source


def open_flat_images(root: Path) -> ImageFolder:
    """All images below a folder, without labels; warns of what is not used."""
    found = pictures_below(existing_folder(root), root)
    if not found.pictures:
        raise UserError(f"data folder {root} holds no image{_others([found])}")
    samples = [Sample(path.relative_to(root).as_posix(), path, -1) for path in found.pictures]
    mention_skipped(root, found.skipped)
    return ImageFolder(root, (), tuple(sorted(samples, key=lambda sample: sample.id)), found.skipped)


def _others(found: Sequence[Found]) -> str:
    """What is there instead of images, in brackets."""
    skipped = [entry for here in found for entry in here.skipped]
    return f" (found {skipped[0][0]}, {skipped[0][1]}, and {len(skipped) - 1} more)" if skipped else ""


def open_features(path: Path) -> FeatureFile:
    """An npz file with the arrays features (N, D) or (N, V, D), labels (N,), and perhaps class_names (K,), logit_scale.

    Raises UserError where the file or one of its arrays cannot be used.
    """
    if not path.is_file():
        raise UserError(f"feature file {path} " + ("is a folder" if path.is_dir() else "does not exist"))
    try:
        # NumPy would read a bare array, too, and answer anything else with advice to unpickle it.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip archive")
        # Opened here: NumPy leaves a file that it cannot read open.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            _check_headers(path, file.zip)
            held = sorted(file.files)
            arrays = {name: file[name] for name in ("features", "labels", "class_names", "logit_scale") if name in held}
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in any of zipfile's, zlib's and NumPy's ways
        raise UserError(f"feature file {path} is not a readable npz file: {error}") from None
    if not {"features", "labels"} <= arrays.keys():
        raise UserError(f"feature file {path} must have the arrays features and labels, it has {held}")
    features, labels = arrays["features"], arrays["labels"]
    if features.ndim not in (2, 3) or features.dtype.kind != "f":
        raise UserError(
            f"feature file {path}: features must be floating point (N, D) or (N, V, D), "
            f"got {features.dtype} {features.shape}"
        )
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"feature file {path}: labels must be {len(features)} whole numbers, got {labels.dtype} {labels.shape}"
        )
    if 0 in features.shape:
        raise UserError(f"feature file {path}: features must not be empty, got shape {features.shape}")
    if labels.min() < 0:
        raise UserError(f"feature file {path}: labels must be at least 0, got {labels.min()} in row {labels.argmin()}")
    if labels.max() >= MOST_CLASSES:
        raise UserError(
            f"feature file {path}: labels must be below {MOST_CLASSES}, they number the classes from 0, "
            f"got {labels.max()} in row {labels.argmax()}"
        )
    # Before the checks: a float64 value past float32's range becomes infinite, a tiny one zero.
    with np.errstate(over="ignore", under="ignore"):
        features = features.astype(np.float32)
    rows = features.reshape(len(features), -1)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise UserError(
            f"feature file {path}: features must be finite, got NaN or infinity in {bad.sum()} of {len(rows)} rows, "
            f"the first is row {bad.argmax()}"
        )
    largest = np.maximum(features.max(axis=-1), -features.min(axis=-1)).reshape(len(features), -1)
    zero = (largest < SMALLEST_FEATURE).any(axis=1)
    if zero.any():
        raise UserError(
            f"feature file {path}: features must not be all zero, row {zero.argmax()} is, the first of {zero.sum()}"
        )
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US" or len(names) <= labels.max()):
        raise UserError(
            f"feature file {path}: class_names must be at least {labels.max() + 1} texts, one a label, "
            f"got {names.dtype} {names.shape}"
        )
    found = [] if names is None else names.tolist()
    try:
        # In a NumPy array of bytes, names are UTF-8.
        texts = tuple(str(name, "utf-8") if isinstance(name, bytes) else name for name in found)
    except UnicodeDecodeError as error:
        raise UserError(f"feature file {path}: class_names must be texts in UTF-8: {error}") from None
    return FeatureFile(
        path,
        torch.from_numpy(features),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(str(index) for index in range(len(labels))),
        None if names is None else texts,
        _logit_scale(path, arrays.get("logit_scale")),
    )


def _check_headers(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise an error where an archive's arrays are not what their headers say, before memory is taken for them."""
    names = archive.namelist()
    shapes = {}
    for name in ("features.npy", "labels.npy", "class_names.npy", "logit_scale.npy"):
        if names.count(name) > 1:
            raise ValueError(f"it holds {name} {names.count(name)} times")
        if name not in names:
            continue
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            if version not in _HEADER_READERS:
                raise ValueError(f"{name} is of format {version}, known are {', '.join(map(str, _HEADER_READERS))}")
            shapes[name], _, dtype = _HEADER_READERS[version](member)
            stated = member.tell() + math.prod(shapes[name]) * dtype.itemsize
        held = archive.getinfo(name).file_size
        if stated != held and not dtype.hasobject:  # objects are refused when they are read
            raise ValueError(f"{name} must have {stated} bytes for {dtype} {shapes[name]}, it has {held}")
    features, labels = (shapes.get(name, ()) for name in ("features.npy", "labels.npy"))
    if len(features) in (2, 3) and len(labels) == 1 and features[0] != labels[0]:
        raise UserError(f"feature file {path}: labels must be {features[0]} whole numbers, got shape {labels}")


def _logit_scale(path: Path, array: np.ndarray[Any, Any] | None) -> float | None:
    """The multiplier that a feature file states. Raises UserError where it is none."""
    if array is None:
        return None
    value = float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else math.nan
    if not 0 < value <= float(np.finfo(np.float32).max):
        got = f"{array.dtype} {array.shape}" if math.isnan(value) else f"{value:g}"
        raise UserError(f"feature file {path}: logit_scale must be one number above 0 that float32 holds, got {got}")
    return value


def base_and_new(num_classes: int) -> tuple[list[int], list[int]]:
    """Labels of the base classes, the first half rounded up, and of the new ones."""
    middle = (num_classes + 1) // 2
    return list(range(middle)), list(range(middle, num_classes))
