"""Feature files: npz archives with features that a model extracted from images."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rada_fast.data.sources import NO_CLASS, FeatureFile
from rada_fast.errors import UserError

MAX_CLASSES = 2**20
"""A label of this size or more is a mistake: every class up to the largest label needs a name and a text feature."""
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SMALLEST_FEATURE = 1e-12
"""A row whose values are all below this has no direction: PyTorch's normalize divides by at least as much."""


def read_feature_file(path: Path) -> FeatureFile:
    """Read the array features (N, D) or (N, V, D), and labels (N,), ids (N,), class_names (K,) and logit_scale.

    Only the features are required. Without labels the images have no classes; without ids their numbers name them.

    Raises UserError where the file or one of its arrays cannot be used.
    """
    if not path.is_file():
        raise UserError(f"feature file {path} " + ("is a folder" if path.is_dir() else "does not exist"))
    try:
        # NumPy would also read a bare array, and would answer anything else with the advice to unpickle it.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip archive")
        # The file is opened here because NumPy does not close a file that it cannot read.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            _check_headers(path, file.zip)
            stored = sorted(file.files)
            arrays = {
                name: file[name]
                for name in ("features", "labels", "ids", "class_names", "logit_scale")
                if name in stored
            }
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many errors for a damaged archive
        raise UserError(f"feature file {path} is not a readable npz file: {error}") from None
    if "features" not in arrays:
        raise UserError(f"feature file {path} must have the array features, it has {stored}")
    features = arrays["features"]
    unlabelled = np.full(features.shape[:1], NO_CLASS)
    labels = arrays.get("labels", unlabelled)
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
    if labels is not unlabelled and labels.min() < 0:
        raise UserError(f"feature file {path}: labels must be at least 0, got {labels.min()} in row {labels.argmin()}")
    if labels.max() >= MAX_CLASSES:
        raise UserError(
            f"feature file {path}: labels must be below {MAX_CLASSES}, they number the classes from 0, "
            f"got {labels.max()} in row {labels.argmax()}"
        )
    # The conversion comes before the checks, because it makes large float64 values infinite and tiny ones zero.
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
            f"feature file {path}: class_names must be at least {labels.max() + 1} texts, one for each label, "
            f"got {names.dtype} {names.shape}"
        )
    found = [] if names is None else names.tolist()
    try:
        # A NumPy array of bytes holds names in UTF-8.
        texts = tuple(str(name, "utf-8") if isinstance(name, bytes) else name for name in found)
    except UnicodeDecodeError as error:
        raise UserError(f"feature file {path}: class_names must be texts in UTF-8: {error}") from None
    return FeatureFile(
        path,
        torch.from_numpy(features),
        torch.from_numpy(labels.astype(np.int64)),
        _ids(path, arrays.get("ids"), len(labels)),
        None if names is None else texts,
        _logit_scale(path, arrays.get("logit_scale")),
    )


def _ids(path: Path, array: np.ndarray[Any, Any] | None, count: int) -> tuple[str, ...]:
    """Return the names of the images: those in the file, or their numbers. Raises UserError where they are not unique.

    array: the array ids of the file, or None.
    count: the number of images.
    """
    if array is None:
        return tuple(str(index) for index in range(count))
    if array.shape != (count,) or array.dtype.kind != "U":
        raise UserError(f"feature file {path}: ids must be {count} texts, got {array.dtype} {array.shape}")
    ids = tuple(array.tolist())
    if len(set(ids)) < count:
        raise UserError(f"feature file {path}: ids must differ, {count - len(set(ids))} of {count} repeat another one")
    return ids


def _check_headers(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise an error where arrays differ from their headers, before memory is allocated for them."""
    names = archive.namelist()
    shapes = {}
    for name in ("features.npy", "labels.npy", "ids.npy", "class_names.npy", "logit_scale.npy"):
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
        stored = archive.getinfo(name).file_size
        if stated != stored and not dtype.hasobject:  # arrays of objects are refused when they are read
            raise ValueError(f"{name} must have {stated} bytes for {dtype} {shapes[name]}, it has {stored}")
    features, labels = (shapes.get(name, ()) for name in ("features.npy", "labels.npy"))
    if len(features) in (2, 3) and len(labels) == 1 and features[0] != labels[0]:
        raise UserError(f"feature file {path}: labels must be {features[0]} whole numbers, got shape {labels}")


def _logit_scale(path: Path, array: np.ndarray[Any, Any] | None) -> float | None:
    """Return the multiplier that a feature file states. Raises UserError where it cannot be one."""
    if array is None:
        return None
    value = float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else math.nan
    if not 0 < value <= float(np.finfo(np.float32).max):
        got = f"{array.dtype} {array.shape}" if math.isnan(value) else f"{value:g}"
        raise UserError(f"feature file {path}: logit_scale must be one number above 0 that float32 holds, got {got}")
    return value
