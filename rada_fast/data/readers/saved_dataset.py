"""Data sets that the library datasets has saved to disk (save_to_disk), read row by row from their Arrow files."""

from __future__ import annotations

import errno
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rada_fast.data.fingerprints import file_stamp
from rada_fast.data.layouts import contents, existing_root, is_file, sub_folders
from rada_fast.data.parts import Part
from rada_fast.data.readers.coop import unique_keys
from rada_fast.data.readers.features import MAX_CLASSES
from rada_fast.data.readers.webdataset import PART_FOLDERS
from rada_fast.data.sources import ImageFolder, Sample
from rada_fast.data.stored import open_regular
from rada_fast.errors import UserError

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category", "class_name")
"""The columns of labels in order of preference, where several may be meant."""


@dataclass(frozen=True)
class TableRow:
    """A picture in a row of a saved data set.

    folder: the folder with the Arrow files; column: the column of the pictures; index: the number of the row.
    """

    folder: Path
    column: str
    index: int

    @property
    def name(self) -> str:
        """The folder and the number of the row."""
        return f"{self.folder.name}, row {self.index}"

    @property
    def frame(self) -> int:
        """No pixels are cut off."""
        return 0

    def open(self) -> BinaryIO:
        """Read the encoded picture. A picture that is stored as a path must lie below the folder."""
        found = _pictures(self.folder, self.column)[self.index].as_py()
        data, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
        if data is not None:
            return io.BytesIO(data)
        inside = self.folder.resolve()
        if path is None or not (whole := (inside / path).resolve()).is_relative_to(inside):
            raise OSError(errno.ENOENT, f"the data set does not hold its bytes but the path {path}; save it anew")
        return open_regular(whole)

    def stamp(self) -> str:
        """Return the stamp of the data set's state, which saving it changes, and the number of the row."""
        return f"{file_stamp(self.folder / 'state.json')} row {self.index}"


def _library() -> Any:
    """Return the library datasets. Raises UserError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:PATH needs the package datasets ({error}): pip install 'rada_fast[data]'") from None
    return datasets


@lru_cache(maxsize=8)
def _pictures(folder: Path, column: str) -> Any:
    """Return the column of encoded pictures of a data set. Each process opens it once."""
    return _library().load_from_disk(str(folder)).data.column(column)


def read_saved_dataset(path: Path, part: Part) -> ImageFolder:
    """Read a data set that save_to_disk wrote: a Dataset, or the part of a DatasetDict.

    The pictures are in the column of type Image, or else in the column image of bytes; the labels are in the column of
    type ClassLabel, or in one called label, as numbers or names.

    Raises UserError where the library datasets is not installed or the folder holds no such data set.
    """
    existing_root(path, "hf:PATH")
    folder = _part_folder(path, part)
    library = _library()
    try:
        table = library.load_from_disk(str(folder))
        features = table.features
        column = _image_column(library, features, folder)
        labels = _label_column(library, features, folder)
        values = [] if labels is None else table.data.column(labels).to_pylist()
        count = len(table)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise many errors for a damaged folder
        raise UserError(f"hf: {folder} is not a readable data set: {' '.join(str(error).split())[:200]}") from None
    if count == 0:
        raise UserError(f"hf: {folder} has no row")
    known = features[labels].names if labels is not None and isinstance(features[labels], library.ClassLabel) else None
    keys: tuple[str, ...] = ()
    numbers = [-1] * count
    if values:
        keys, numbers = _classes(values, known, f"hf: {folder}: column {labels}")
    samples = tuple(Sample(str(row), TableRow(folder, column, row), number) for row, number in enumerate(numbers))
    return ImageFolder(folder, keys, samples, what="saved data set")


def _part_folder(path: Path, part: Part) -> Path:
    """Return the folder of the Arrow files of a part."""
    if is_file(path / "state.json"):
        return path
    parts = [below.name for below in sub_folders(path) if is_file(below / "state.json")]
    if not parts:
        raise UserError(
            f"hf: {path} must be a folder that save_to_disk of the library datasets wrote, with state.json or "
            f"dataset_dict.json; it {contents(path)}"
        )
    for name in PART_FOLDERS[part]:
        if name in parts:
            return path / name
    raise UserError(f"hf: {path} has no part for {part}, it has {', '.join(parts)}; give one: hf:{path / parts[0]}")


def _image_column(library: Any, features: Mapping[str, Any], folder: Path) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    binary = [name for name, feature in features.items() if getattr(feature, "dtype", None) == "binary"]
    found = images or [name for name in binary if name in ("image", "img", "picture", "jpg", "png", "bytes")]
    if len(found) == 1:
        return found[0]
    raise UserError(f"hf: {folder} must have one column of type Image, it has {len(found)} among {', '.join(features)}")


def _label_column(library: Any, features: Mapping[str, Any], folder: Path) -> str | None:
    labels = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    found = [name for name in _LABEL_COLUMNS if name in (labels or features)]
    if found or not labels:
        return found[0] if found else None
    if len(labels) == 1:
        return labels[0]
    raise UserError(f"hf: {folder} has several columns of labels, {', '.join(labels)}; rename the one to use to label")


def _classes(values: Sequence[Any], known: Sequence[str] | None, where: str) -> tuple[tuple[str, ...], list[int]]:
    """Return the keys of the classes and the label of each row."""
    if all(type(value) is int for value in values):
        most = MAX_CLASSES if known is None else len(known)
        if wrong := [row for row, value in enumerate(values) if not 0 <= value < most]:
            if known is not None and all(value == -1 for value in values):
                return (), list(values)  # the labels of many test sets are withheld
            raise UserError(f"{where} must be in 0 ... {most - 1}, it is {values[wrong[0]]} in row {wrong[0]}")
        if known is None:
            return tuple(map(str, range(max(values) + 1))), list(values)
        return unique_keys(known), list(values)
    if all(isinstance(value, str) and value.strip() for value in values):
        keys = tuple(sorted(set(values)))
        label_of = {name: label for label, name in enumerate(keys)}
        return keys, [label_of[value] for value in values]
    raise UserError(f"{where} must hold numbers or names, one in each row")
