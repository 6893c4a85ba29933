"""The finding of a data set's folders, which every project names differently, and messages about the search."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rada_fast.data.folders import EXAMPLES, SYSTEM_FOLDERS
from rada_fast.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
SHOWN_PLACES = 7
"""A message names no more places than these."""
SEARCHED = 200
"""As many folders of each level are looked at for a suggestion."""
SUGGESTED_DEPTH = 3
"""A folder that would do is looked for this many levels below the folder that was given."""


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder. A path that is too long or out of reach is none."""
    return os.path.isdir(path)  # noqa: PTH112 -- Path.is_dir raises an error for those in Python 3.11


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file. A path that is too long or out of reach is none."""
    return os.path.isfile(path)  # noqa: PTH113 -- Path.is_file raises an error for those in Python 3.11


def descend(root: Path, relative: str) -> Path | None:
    """Return the folder or file at a path below a folder, or None. Capital and small letters count as equal.

    An entry whose name is spelled exactly as given comes before others.
    """
    current = root
    for part in (part for part in relative.split("/") if part not in ("", ".")):
        if not is_folder(current / part) and not is_file(current / part):
            found = sorted(entry.name for entry in entries(current) if entry.name.casefold() == part.casefold())
            if not found:
                return None
            part = found[0]
        current /= part
    return current


def entries(folder: Path) -> list[Path]:
    """Return the entries of a folder that are not hidden, sorted by name, or none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def sub_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder that are not hidden or left by a system, sorted by name."""
    return [path for path in entries(folder) if path.name not in SYSTEM_FOLDERS and is_folder(path)]


def existing_root(path: Path, what: str) -> Path:
    """Return the folder itself. Raises UserError where it does not exist, cannot be reached, or is a file."""
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{what} must be a folder, {path} is a file")
    except OSError as error:
        raise UserError(f"{what}: folder {path} cannot be read: {error.strerror}") from None
    above = next(folder for folder in path.absolute().parents if is_folder(folder))
    raise UserError(f"{what}: folder {path} does not exist; {above} {contents(above)}")


def find_folder(root: Path, candidates: Iterable[str], fits: Callable[[Path], bool]) -> Path | None:
    """Return the first candidate below a folder that exists and fits, or None. "" stands for the folder itself."""
    for candidate in candidates:
        found = descend(root, candidate)
        if found is not None and is_folder(found) and fits(found):
            return found
    return None


def nearby(root: Path, fits: Callable[[Path], bool]) -> Path | None:
    """Return a folder a few levels below that fits, for a suggestion, or None."""
    level = [root]
    for _ in range(SUGGESTED_DEPTH):
        level = [below for folder in level[:SEARCHED] for below in sub_folders(folder)[:SEARCHED]]
        for folder in level[:SEARCHED]:
            if fits(folder):
                return folder
    return None


def contents(folder: Path) -> str:
    """Return what a folder holds, in the words of a message."""
    if not is_folder(folder):
        return "does not exist"
    found = entries(folder)
    if not found:
        return "is empty"
    names = [path.name + ("/" if is_folder(path) else "") for path in found]
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return f"holds {', '.join(names[:EXAMPLES])}{more}"


def archive_hint(folder: Path) -> str:
    """Return an addition to a message where a folder holds archives that may have to be extracted."""
    found = [path.name for path in entries(folder) if path.name.lower().endswith(ARCHIVES)]
    return f"; extract {', '.join(found[:EXAMPLES])} first" if found else ""


def shown(root: Path, candidates: Iterable[str]) -> str:
    """Return the places where something was looked for, in the words of a message. Of many, only some are named."""
    places = list(dict.fromkeys(os.path.normpath(root / candidate) for candidate in candidates))
    if len(places) > SHOWN_PLACES:
        return f"{', '.join(places[: SHOWN_PLACES - 1])}, {len(places) - SHOWN_PLACES} more, and {places[-1]}"
    return ", ".join(places)


def lines_of(path: Path, what: str) -> Iterator[str]:
    """Yield the lines of a text file without spaces at their ends, and without empty ones.

    Raises UserError where it cannot be read.
    """
    yield from (line.strip() for line in text_of(path, what).splitlines() if line.strip())


def text_of(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark.

    what: what a message calls the file, such as "classes file".

    Raises UserError where the file cannot be read or is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not a text file") from None
