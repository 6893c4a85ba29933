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
from rada_fast.data.sources import NO_CLASS, ImageFolder, Sample
from rada_fast.data.stored import AbsentFile, open_regular
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
    "imagename",
    "imgname",
    "relativepath",
    "relpath",
    "fname",
)
_NAMES = ("classname", "labelname", "name", "category", "species", "labeltext", "wnid", "synset")
_NUMBERS = ("labelid", "classid", "classindex", "classidx", "target", "y")
_EITHER = ("label", "class", "labels", "cls")
_CAPTIONS = ("title", "caption")
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?")
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
    every = _with_slashes(_rows(path), path)
    captions: dict[str, list[str]] = {}
    first: dict[str, Row] = {}
    for row in every:
        known = first.setdefault(row.path, row)
        if (known.number, known.name) != (row.number, row.name):
            raise UserError(f"table {path}: lines {known.line} and {row.line} give {row.path!r} different classes")
        if row.caption is not None:
            captions.setdefault(row.path, []).append(row.caption)
    # A part may lack a class that another part has, and has the same classes all the same.
    listed = list(first.values())
    folders, names, labels = _classes(listed, captions, path)
    label_of = {row.path: label for row, label in zip(listed, labels, strict=True)}
    rows = _rows_of_part(every, part, path) if any(row.part is not None for row in every) else every
    unique = list({row.path: row for row in reversed(rows)}.values())[::-1]
    if len(unique) < len(rows) and not captions:
        notices.warn(f"table {path}: {len(rows) - len(unique)} rows repeat a picture, which is read once")
    own = [label_of[row.path] for row in unique]
    if unlabelled := [row for row, label in zip(unique, own, strict=True) if label == NO_CLASS]:
        if len(unlabelled) < len(unique):
            raise UserError(f"table {path}: line {unlabelled[0].line} has no class, other lines of {part} have one")
        folders, names = (), None
    root = _root(path, [row.path for row in unique])
    missing = missing_images(root, [row.path for row in unique])
    absent = frozenset(missing)
    samples = tuple(
        Sample(id, AbsentFile(root / row.path) if row.path in absent else root / row.path, label)
        for id, row, label in zip(_ids(unique), unique, own, strict=True)
    )
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
    if lines and re.fullmatch(r"sep=.", lines[0]):
        lines = lines[1:]  # it tells Excel the separator
    if len(lines) < 2:
        raise UserError(f"table {path} must have a line with the names of its columns and one for each picture")
    # Other signs of the first line may be parts of the columns' names.
    delimiter = max(",\t;", key=lambda sign: (_names_paths(lines[0].split(sign)), lines[0].count(sign)))
    try:
        # FLYP writes captions without quotation marks around them, and some contain one.
        if delimiter == "\t" and not lines[0].startswith('"'):
            cells = list(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
        else:
            cells = list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"table {path} cannot be read: {error}") from None
    header = [_plain(cell) for cell in cells[0]]
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
        role = "number" if all(_NUMBER.fullmatch(text.strip()) for text in texts if text.strip()) else "name"
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


def _plain(cell: str) -> str:
    """Return the name of a column in the form in which names of columns are compared."""
    return re.sub(r"[^a-z0-9]", "", cell.lower())


def _names_paths(cells: Sequence[str]) -> bool:
    """Return whether one of the names of columns is that of a column of paths."""
    return any(_plain(cell) in _PATHS for cell in cells)


def _with_slashes(rows: list[Row], path: Path) -> list[Row]:
    """Return the rows with forward slashes in their paths where the table was written on Windows."""
    backslashed = [row.path for row in rows if "\\" in row.path]
    if not backslashed or any(_exists(_root(path, backslashed) / one) for one in backslashed[:PROBED]):
        return rows
    return [row._replace(path=row.path.replace("\\", "/")) for row in rows]


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
    """Return the keys of the classes, their names where they are known, and the label of each row, -1 without one."""
    if any(row.number for row in rows):
        return _numbered_classes(rows, path)
    keys = tuple(sorted({row.name for row in rows if row.name}))
    if keys:
        label_of = {name: label for label, name in enumerate(keys)}
        return keys, None, [label_of.get(row.name or "", NO_CLASS) for row in rows]
    if captions:
        return _captioned_classes(rows, captions, path)
    return (), None, [NO_CLASS] * len(rows)


def _numbered_classes(rows: Sequence[Row], path: Path) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[int]]:
    labels = []
    names: dict[int, str] = {}
    for row in rows:
        if not row.number:
            labels.append(NO_CLASS)
            continue
        # Tables with an empty cell in a column have the other numbers of it written as 1.0 by pandas.
        label = int(row.number.partition(".")[0]) if _NUMBER.fullmatch(row.number) else NO_CLASS
        if not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"table {path}: line {row.line} must have a label in 0 ... {MAX_CLASSES - 1}, got {row.number!r}"
            )
        labels.append(label)
        if row.name and names.setdefault(label, row.name) != row.name:
            raise UserError(
                f"table {path}: line {row.line} calls the label {row.number} {row.name!r}, an earlier line "
                f"{names[label]!r}"
            )
    present = sorted(set(labels) - {NO_CLASS})
    if list(names) and set(names) == set(present):
        # Only what has a name can be a class in a prompt.
        ordered = tuple(names[label] for label in present)
        if len(present) <= present[-1]:
            notices.warn(
                f"table {path}: its {len(present)} classes have labels between {present[0]} and {present[-1]}; they "
                "are numbered anew in this order"
            )
        keys = ordered if len(set(ordered)) == len(ordered) else tuple(map(str, present))
        new = {label: index for index, label in enumerate(present)} | {NO_CLASS: NO_CLASS}
        return keys, None if keys == ordered else ordered, [new[label] for label in labels]
    if present[0] > 0:
        notices.warn(f"table {path}: labels begin at {present[0]}, not at 0; the classes below it have no picture")
    return tuple(map(str, range(present[-1] + 1))), None, labels


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
