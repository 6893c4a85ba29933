"""Tables of pictures: a CSV or TSV file with a path in each row, and a label, the name of a class or a caption."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rada_fast.data.folders import EXAMPLES
from rada_fast.data.parts import Part
from rada_fast.data.readers.coop import missing_images
from rada_fast.data.readers.features import MAX_CLASSES
from rada_fast.data.sources import ImageFolder, Sample
from rada_fast.data.stored import open_regular
from rada_fast.errors import UserError
from rada_fast.system import notices

PROBED = 50
"""As many paths are looked for to find out which folder they start from."""
_PATHS = (
    "filepath",
    "path",
    "imagepath",
    "impath",
    "imgpath",
    "filename",
    "file",
    "image",
    "img",
    "imagefile",
    "fname",
)
_NAMES = ("classname", "labelname", "name", "category", "species", "labeltext")
_NUMBERS = ("labelid", "classid", "classindex", "classidx", "target", "y")
_EITHER = ("label", "class", "labels", "cls")
_CAPTIONS = ("title", "caption")
_PARTS = ("split", "subset", "partition", "set")
_PART_NAMES: dict[str, Part] = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip


class Row(NamedTuple):
    """A row of a table: the line that it is on, the path, and the label, name, caption and part where it has them."""

    line: int
    path: str
    number: str | None
    name: str | None
    caption: str | None
    part: str | None


def read_table(path: Path, part: Part) -> ImageFolder:
    """Read the pictures that a table lists.

    The first line names the columns: a path (filepath, path, image, filename, ...), and where they are known a label
    (label, class_id, target, ...), the name of a class (class_name, class, category, ...) and a part (split). FLYP's
    tables have a caption (title) in place of a label and repeat each picture for every caption. Paths start from the
    folder of the table, one above it, or the current folder; they may lead anywhere, because the table is the user's.

    Raises UserError where the table cannot be read, has no column of paths, or contradicts itself.
    """
    rows = _rows(path)
    if any(row.part is not None for row in rows):
        rows = _rows_of_part(rows, part, path)
    captions: dict[str, list[str]] = {}
    first: dict[str, Row] = {}
    for row in rows:
        known = first.setdefault(row.path, row)
        if (known.number, known.name) != (row.number, row.name):
            raise UserError(f"table {path}: lines {known.line} and {row.line} give {row.path!r} different classes")
        if row.caption is not None:
            captions.setdefault(row.path, []).append(row.caption)
    unique = list(first.values())
    if len(unique) < len(rows) and not captions:
        notices.warn(f"table {path}: {len(rows) - len(unique)} rows repeat a picture, which is read once")
    folders, names, labels = _classes(unique, captions, path)
    root = _root(path, [row.path for row in unique])
    samples = tuple(
        Sample(id, root / row.path, label) for id, row, label in zip(_ids(unique), unique, labels, strict=True)
    )
    missing = missing_images(root, [row.path for row in unique])
    if len(missing) == len(unique):
        raise UserError(f"table {path}: none of its {len(unique)} pictures exists, the first is {root / missing[0]}")
    if missing:
        notices.warn(
            f"table {path}: {len(missing)} of its {len(unique)} pictures do not exist and will count as unreadable: "
            f"{', '.join(missing[:EXAMPLES])}"
        )
    return ImageFolder(path, folders, samples, names=names, what="table")


def _rows(path: Path) -> list[Row]:
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"table {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"table {path} is not a text file in UTF-8") from None
    lines = text.splitlines()
    if len(lines) < 2:
        raise UserError(f"table {path} must have a line with the names of its columns and one for each picture")
    delimiter = max("\t,;", key=lines[0].count)
    try:
        # FLYP writes captions without quotation marks around them, and some contain one.
        if delimiter == "\t":
            cells = list(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
        else:
            cells = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"table {path} cannot be read: {error}") from None
    header = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in cells[0]]
    column = {
        role: next((header.index(word) for word in words if word in header), None)
        for role, words in (
            ("path", _PATHS), ("number", _NUMBERS), ("name", _NAMES), ("either", _EITHER), ("caption", _CAPTIONS),
            ("part", _PARTS),
        )
    }  # fmt: skip
    if column["path"] is None:
        raise UserError(
            f"table {path}: its first line must name a column of paths, such as path or filepath, it has "
            f"{', '.join(cells[0][:8])!r}"
        )
    if column["either"] is not None:
        # A column that is called label holds numbers in some tables and names in others.
        texts = [row[column["either"]] for row in cells[1:] if len(row) > column["either"]]
        role = "number" if all(re.fullmatch(r"\s*\d{1,9}\s*", text) for text in texts) else "name"
        column[role] = column["either"] if column[role] is None else column[role]
    rows = []
    for line, row in enumerate(cells[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise UserError(f"table {path}: line {line} has {len(row)} cells, the first line {len(header)}")
        found = {role: None if at is None else row[at].strip() for role, at in column.items()}
        if not found["path"] or "\0" in found["path"]:
            raise UserError(f"table {path}: line {line} has no path")
        rows.append(Row(line, found["path"], found["number"], found["name"], found["caption"], found["part"]))
    if not rows:
        raise UserError(f"table {path} lists no picture")
    return rows


def _rows_of_part(rows: Sequence[Row], part: Part, path: Path) -> list[Row]:
    """Return the rows of a part. Test images are those of validation where no row is for tests."""
    parts = [_PART_NAMES.get((row.part or "").lower()) for row in rows]
    if None in parts:
        row = rows[parts.index(None)]
        raise UserError(f"table {path}: line {row.line} must name the part train, val or test, got {row.part!r}")
    wanted = "val" if part == "test" and "test" not in parts else part
    found = [row for row, own in zip(rows, parts, strict=True) if own == wanted]
    if not found:
        raise UserError(f"table {path} has no picture of {part}, it has {', '.join(sorted({str(p) for p in parts}))}")
    return found


def _classes(
    rows: Sequence[Row], captions: dict[str, list[str]], path: Path
) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[int]]:
    """Return the keys of the classes, their names where they are known, and the label of each row."""
    if all(row.number is not None for row in rows):
        return _numbered_classes(rows, path)
    names = [row.name for row in rows]
    if any(name is not None for name in names):
        if blank := [row for row in rows if not row.name]:
            raise UserError(f"table {path}: line {blank[0].line} has no name of a class")
        keys = tuple(sorted({name for name in names if name is not None}))
        label_of = {name: label for label, name in enumerate(keys)}
        return keys, None, [label_of[name or ""] for name in names]
    if captions:
        return _captioned_classes(rows, captions, path)
    return (), None, [-1] * len(rows)


def _numbered_classes(rows: Sequence[Row], path: Path) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[int]]:
    labels = []
    names: dict[int, str] = {}
    for row in rows:
        if not re.fullmatch(r"\d{1,9}", row.number or "") or int(row.number or 0) >= MAX_CLASSES:
            raise UserError(
                f"table {path}: line {row.line} must have a label in 0 ... {MAX_CLASSES - 1}, got {row.number!r}"
            )
        labels.append(int(row.number or 0))
        if row.name and names.setdefault(labels[-1], row.name) != row.name:
            raise UserError(
                f"table {path}: line {row.line} calls the label {row.number} {row.name!r}, an earlier line "
                f"{names[labels[-1]]!r}"
            )
    count = max(labels) + 1
    if min(labels) > 0:
        notices.warn(f"table {path}: labels begin at {min(labels)}, not at 0; the classes below it have no picture")
    if len(names) == count:
        ordered = tuple(names[label] for label in range(count))
        if len(set(ordered)) == count:
            return ordered, None, labels
        return tuple(map(str, range(count))), ordered, labels
    return tuple(map(str, range(count))), None, labels


def _captioned_classes(
    rows: Sequence[Row], captions: dict[str, list[str]], path: Path
) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[int]]:
    """Return the classes of FLYP's tables: pictures with the same captions have the same class.

    A class is called by what its first caption does not have in common with those of the other classes. Where every
    class has a folder of its own, the folders are its keys, in whose order FLYP numbers the classes.
    """
    sets = [tuple(captions[row.path]) for row in rows]
    first = {one: one[0] for one in sets}
    if len(set(first.values())) < len(first) or (len(first) > len(rows) // 2 and len(rows) > 3):
        raise UserError(
            f"table {path}: its captions do not tell classes apart ({len(first)} for {len(rows)} pictures); add a "
            "column label or class_name"
        )
    shown = dict(zip(first, _differences(list(first.values())), strict=True))
    parents: dict[tuple[str, ...], set[str]] = {one: set() for one in first}
    for row, one in zip(rows, sets, strict=True):
        parents[one].add(row.path.rpartition("/")[0])
    folders = [next(iter(found)) for found in parents.values() if len(found) == 1]
    leaves = {one: next(iter(found)).rpartition("/")[2] for one, found in parents.items()}
    if len(set(folders)) == len(first) == len(set(leaves.values())):
        order = sorted(first, key=lambda one: leaves[one])
        keys = tuple(leaves[one] for one in order)
    else:
        order = sorted(first, key=lambda one: shown[one])
        keys = tuple(shown[one] for one in order)
    label_of = {one: label for label, one in enumerate(order)}
    return keys, tuple(shown[one] for one in order), [label_of[one] for one in sets]


def _differences(texts: Sequence[str]) -> list[str]:
    """Return what remains of texts without the words and signs that all begin and end with."""
    words = [re.findall(r"\w+|\W", text) for text in texts]
    shortest = min(map(len, words))
    begin = 0
    while len(texts) > 1 and begin < shortest - 1 and len({word[begin] for word in words}) == 1:
        begin += 1
    end = 0
    while len(texts) > 1 and end < shortest - 1 - begin and len({word[-1 - end] for word in words}) == 1:
        end += 1
    return ["".join(word[begin : len(word) - end]).strip() for word in words]


def _root(path: Path, listed: Sequence[str]) -> Path:
    """Return the folder from which most of the first paths start."""
    probed = listed[:PROBED]
    folders = dict.fromkeys([path.parent, Path(), *path.absolute().parents[1:4]])
    counts = {folder: sum(_exists(folder / one) for one in probed) for folder in folders}
    return max(counts, key=lambda folder: counts[folder])


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 -- Path.exists raises an error for a name that is too long


def _ids(rows: Sequence[Row]) -> list[str]:
    """Return the paths as ids. Absolute paths lose the folder that is common to all, which may differ elsewhere."""
    paths = [os.path.normpath(row.path).replace(os.sep, "/") for row in rows]
    absolute = [path for path in paths if path.startswith("/")]
    if len(absolute) == len(paths):
        common = os.path.commonpath([path.rpartition("/")[0] or "/" for path in paths]).rstrip("/")
        paths = [path[len(common) + 1 :] for path in paths]
    if len(set(paths)) < len(paths):
        paths = [row.path for row in rows]
    return paths
