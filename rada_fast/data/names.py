"""The reading of class names from files and folders: lists, tables, and names that are made readable for prompts."""

from __future__ import annotations

import ast
import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rada_fast.data.folders import is_number
from rada_fast.data.layouts import text_of
from rada_fast.errors import UserError
from rada_fast.system import notices

Names = list[str] | dict[str, str]
"""The names in label order, or the name of each class by its folder."""

WNID = re.compile(r"n\d{8}", re.IGNORECASE)
"""A WordNet id, as ImageNet's folders are called."""

_SYNSET_LINE = re.compile(r"(n\d{8})\s*[\s,;]\s*(\S.*)", re.IGNORECASE)
_LEADING_NUMBER = re.compile(r"(\d+)(\s*[.:;,)\-]\s*|\s+)(\S.*)")
_TRAILING_NUMBER = re.compile(r"(\S.*?)[\s,;:]+(\d+)")
_NUMBER_PREFIX = re.compile(r"(\d+)([._\- ]+)(?=[^\W\d_])(.+)")
_WNID_PREFIX = re.compile(r"n\d{8}[-_. ]+(.+)", re.IGNORECASE)
_KEY_WORDS = frozenset({"folder", "dir", "directory", "wnid", "synset", "code"})
_NAME_WORDS = frozenset(
    {"name", "names", "class_name", "classname", "class_names", "label_name", "text", "description"}
)
_EITHER_WORDS = frozenset({"class", "classes", "label", "labels", "category", "category_name"})
_NUMBER_WORDS = frozenset(
    {"", "#", "no", "nr", "id", "idx", "index", "class_id", "class_idx", "class_index", "label_id"}
)
_NUMBER_WORDS |= {"classid", "labelid", "target", "number", "category_id"}
_HEADER_WORDS = _KEY_WORDS | _NAME_WORDS | _EITHER_WORDS | _NUMBER_WORDS


def read_names(path: Path, folders: Sequence[str] = ()) -> Names:
    """Read class names from a file that has one name per line, a table, or JSON.

    A table has a line for each class, with a number, a class folder or a WordNet id beside the name. Its columns are
    separated by tabs, commas or semicolons, or its lines look like "n01440764 tench", "0 tench" or "0: tench". JSON is
    a list of names, an object from folder, number or WordNet id to name, or an object from name to number. Numbers must
    count the classes from 0 or from 1, or be folders.

    folders: the class folders, which help to tell the columns of a table apart.

    Raises UserError where the file cannot be read, is empty, or does not say which part of a line is the name.
    """
    text = text_of(path, "classes file")
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text, object_pairs_hook=lambda pairs: _distinct(pairs, path))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"classes file {path} is not JSON: {error}") from None
        names = _names_of_json(value, folders, path)
    elif (value := _literal(text)) is not None:
        names = _names_of_json(value, folders, path)
    else:
        names = _names_of_lines([line.strip() for line in text.splitlines() if line.strip()], folders, path)
    if not names:
        raise UserError(f"classes file {path} holds no class name (K = 0)")
    for name in names if isinstance(names, list) else names.values():
        if any(unicodedata.category(character) == "Cc" for character in name):
            raise UserError(f"classes file {path} must hold names without control characters, got {name!r}")
    return names


def _distinct(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise UserError(f"classes file {path} must name every class once, {twice[0]!r} comes twice")
    return dict(pairs)


def _literal(text: str) -> Any:
    """Parse a list or dictionary in the syntax of JSON or Python, as in a well-known text file of ImageNet's names.

    Returns None where the text is something else.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None


def _names_of_json(value: Any, folders: Sequence[str], path: Path) -> Names:
    refused = UserError(f"classes file {path} must hold a list of names, or an object of folder to name")
    if isinstance(value, list):
        if all(isinstance(name, str) and name.strip() for name in value):
            return [name.strip() for name in value]
        pairs = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        if pairs and all(isinstance(part, str | int) for pair in value for part in pair):
            return _names_of_rows([[str(part) for part in pair] for pair in value], None, folders, path)
        raise refused
    if not isinstance(value, dict):
        raise refused
    entries = {str(key): entry for key, entry in value.items()}
    if entries and all(type(entry) is int for entry in entries.values()):
        # The object maps names to numbers, as torchvision's class_to_idx does.
        entries = {str(number): name for name, number in entries.items()}
        if len(entries) < len(value):
            raise UserError(f"classes file {path} must give every name a number of its own")
    if entries and all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries.values()):
        # The object maps numbers to pairs of WordNet id and name, as Keras's imagenet_class_index.json does.
        if any(WNID.fullmatch(folder) for folder in folders):
            entries = {str(wnid): name for wnid, name in entries.values()}
        else:
            entries = {key: entry[1] for key, entry in entries.items()}
    if not all(isinstance(name, str) and name.strip() for name in entries.values()):
        raise refused
    entries = {key: name.strip() for key, name in entries.items()}
    return _by_number(entries, folders) or entries


def _by_number(entries: Mapping[str, str], folders: Sequence[str]) -> Names | None:
    """Return the names in the order of their numbers, or by folder if the folders are numbers.

    Returns None where the numbers do not count from 0 or 1 and are not the folders either.
    """
    if not entries or not all(is_number(key) and len(key) < 10 for key in entries):
        return None
    by_number = {int(key): name for key, name in entries.items()}
    if len(by_number) < len(entries):
        return None
    if folders and all(is_number(folder) and int(folder) in by_number for folder in folders):
        return {folder: by_number[int(folder)] for folder in folders}
    first = min(by_number)
    if first > 1 or max(by_number) - first + 1 != len(by_number):
        return None
    return [by_number[number] for number in sorted(by_number)]


def _names_of_lines(lines: list[str], folders: Sequence[str], path: Path) -> Names:
    if len(lines) == len(folders) + 1 and len(folders) > 1 and _is_header([lines[0]]):
        lines = lines[1:]
    synsets = [_SYNSET_LINE.fullmatch(line) for line in lines]
    if lines and all(synsets):
        return {found[1].lower(): found[2].strip("\"' ") for found in synsets if found}
    for delimiter in "\t;,":
        if lines and all(delimiter in line for line in lines):
            # A quotation mark that is not closed joins several lines into one row.
            try:
                rows = [[part.strip() for part in row] for row in csv.reader(lines, delimiter=delimiter)]
            except csv.Error:
                continue
            if len(rows) == len(lines) and len({len(row) for row in rows}) == 1:
                header = rows[0] if _is_header(rows[0]) or _coded(rows[1:]) - _coded(rows[:1]) else None
                if (names := _table(rows, header, delimiter, folders, path)) is not None:
                    return names
    for pattern, number, name in ((_LEADING_NUMBER, 1, 3), (_TRAILING_NUMBER, 2, 1)):
        parts = [pattern.fullmatch(line) for line in lines]
        entries = {found[number]: found[name].strip("\"' ") for found in parts if found}
        # In "1 star", "2 stars", "3 stars" and in "grade 0", "grade 1" the numbers belong to the names.
        if lines and len(set(entries.values())) == len(lines) and (names := _by_number(entries, folders)) is not None:
            first = next(found for found in parts if found)
            if pattern is _TRAILING_NUMBER or not set(first[2]) & set(":;,\t"):
                notices.warn(
                    f"classes file {path}: the numbers are taken for the classes' numbers, not for parts of the names: "
                    f"{first[0]!r} is {first[name]!r}"
                )
            return names
    if all(re.match(r"\d+\s*[,;\t]", line) for line in lines) and lines:
        raise UserError(f"classes file {path} must number its names from 0 or 1, got {lines[0]!r} first")
    if lines and all(re.fullmatch(r"""[{\[].*["'].*[}\]],?""", line) for line in lines):
        raise UserError(
            f"classes file {path} must hold names, got {lines[0][:80]!r} first; write one name per line or a JSON list"
        )
    if len(lines) == 1 and "," in lines[0]:
        notices.warn(f"classes file {path} has one line, taken as one name; write one name per line: {lines[0][:80]!r}")
    return lines


def _is_header(row: Sequence[str]) -> bool:
    return all(cell.strip("\"' ").lower().replace(" ", "_") in _HEADER_WORDS for cell in row) and any(row)


def _coded(rows: Sequence[Sequence[str]]) -> set[int]:
    """Return the columns that hold numbers only or WordNet ids only."""
    tests = (is_number, WNID.fullmatch)
    columns = enumerate(zip(*rows, strict=True))
    return {index for index, column in columns if any(all(test(cell) for cell in column) for test in tests)}


def _table(
    rows: list[list[str]], header: list[str] | None, delimiter: str, folders: Sequence[str], path: Path
) -> Names | None:
    """Return the names of a table's rows, or None where the lines are names with commas."""
    body = rows[1:] if header is not None else rows
    if not body:
        return []
    columns = list(zip(*body, strict=True))
    if header is None and delimiter == "," and not _coded(body):
        known = set(folders)
        if not any(known and known <= set(column) for column in columns):
            if len(rows) > 1:
                notices.warn(
                    f"classes file {path}: the commas are taken as parts of the names, such as "
                    f"{', '.join(rows[0])!r}; write the columns' names into the first line where they are columns"
                )
            return None
    return _names_of_rows(body, header, folders, path)


def _names_of_rows(rows: list[list[str]], header: list[str] | None, folders: Sequence[str], path: Path) -> Names:
    """Return the names in a table.

    The header, the folders, or the fact that there is only one column of texts tells which column holds them.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    words = [cell.strip("\"' ").lower().replace(" ", "_") for cell in header] if header else [""] * len(columns)
    numbers = [index for index, column in enumerate(columns) if all(is_number(cell) for cell in column)]
    wnids = [index for index, column in enumerate(columns) if all(WNID.fullmatch(cell) for cell in column)]
    texts = [index for index in range(len(columns)) if index not in numbers + wnids]
    keys = [index for index in texts if folders and set(folders) <= set(columns[index])]
    keys = keys or [index for index in texts if words[index] in _KEY_WORDS]
    others = [index for index in texts if index not in keys] or texts
    named = [index for index in others if words[index] in _NAME_WORDS]
    named = named or [index for index in others if words[index] in _EITHER_WORDS] or others
    if len(named) != 1:
        raise _undecided(path, rows[0])
    names = columns[named[0]]
    if blank := [row for row, name in enumerate(names) if not name]:
        raise UserError(
            f"classes file {path} must have a name in every line, line {blank[0] + 1} of its table has none"
        )
    for index in keys + wnids:
        key = [cell.lower() for cell in columns[index]] if index in wnids else columns[index]
        if index != named[0] and len(set(key)) == len(key):
            return dict(zip(key, names, strict=True))
    orders: dict[int, Names] = {}
    for index in numbers:
        entries = dict(zip(columns[index], names, strict=True))
        if len(entries) == len(names) and (found := _by_number(entries, folders)) is not None:
            orders[index] = found
    # A column that is called "id" says more than one without a header, which only counts the lines.
    called = [index for index in orders if words[index] and words[index] in _NUMBER_WORDS] or list(orders)
    if any(orders[index] != orders[called[0]] for index in called):
        raise UserError(
            f"classes file {path} must number its names once, its columns {' and '.join(str(i + 1) for i in called)} "
            f"do it in different ways, got {', '.join(rows[0])!r} first"
        )
    if called:
        return orders[called[0]]
    if numbers:
        raise UserError(
            f"classes file {path} must number its names from 0 or 1, each once, got {', '.join(rows[0])!r} first"
        )
    return names


def _undecided(path: Path, row: Sequence[str]) -> UserError:
    return UserError(
        f"classes file {path} must say which of its {len(row)} columns holds the names, got {', '.join(row)!r} first; "
        "write one name per line, or a first line such as 'index,name' or 'folder,name'"
    )


def readable_names(names: Sequence[str], where: str | None = None) -> tuple[str, ...]:
    """Make names readable for a prompt: spaces replace underscores, and the numbers and ids of folders are taken off.

    CUB's "001.Black_footed_Albatross" becomes "Black footed Albatross", Stanford Dogs' "n02085620-Chihuahua" becomes
    "Chihuahua". Numbers are taken off if every name begins with a number of its own, the names also differ without it,
    and the numbers come before a dot, are filled up with zeros, or count from 0 or 1.

    where: what the names are, for a warning if the numbers count from 0 or 1 and may be meant as parts of the names.
    """
    shown = [found[1] if (found := _WNID_PREFIX.fullmatch(name)) else name for name in names]
    prefixes = [found for name in shown if (found := _NUMBER_PREFIX.fullmatch(name))]
    values = sorted({int(found[1]) for found in prefixes})
    rest = [found[3] for found in prefixes]
    if names and len(values) == len(set(rest)) == len(names):
        counted = values[0] in (0, 1) and values[-1] - values[0] + 1 == len(values)
        filled = len({len(found[1]) for found in prefixes}) == 1 and any(found[1][0] == "0" for found in prefixes)
        sure = (filled and len(prefixes[0][1]) > 1) or all("." in found[2] for found in prefixes)
        if counted and not sure and where is not None:
            notices.warn(
                f"the numbers that {where} begin with are left out of the names: {names[0]!r} becomes {rest[0]!r}; "
                "give --classes FILE where they are meant"
            )
        if counted or sure:
            shown = rest
    return tuple(
        " ".join(name.replace("_", " ").split()) or original for name, original in zip(shown, names, strict=True)
    )
