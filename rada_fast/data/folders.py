"""Listings of data folders: the class folders in order, the pictures at any depth, and the entries that are neither."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rada_fast.data.decode import is_picture, picture_extensions
from rada_fast.data.stored import kind_of_entry
from rada_fast.errors import UserError
from rada_fast.system import notices

SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
)
"""Folders that archivers, file servers and operating systems leave behind. They are never classes."""
SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?)([ _-]?(images?|set|data|\d+))?", re.IGNORECASE)
"""The names of folders that hold one part of a data set, such as "train"."""
EXAMPLES = 5
"""The largest number of names that a message lists."""
LOOP = "a link back to a folder that holds it"


class Skipped(NamedTuple):
    """An entry of a data folder that is not used: its path below the folder, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Found:
    """The contents of a folder at every depth.

    pictures: the picture files, readable or not, sorted; skipped: all other entries.
    """

    pictures: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


def existing_folder(root: Path) -> Path:
    """Return the folder itself. Raises UserError where the path is not a folder."""
    try:
        mode = root.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"data folder {root} does not exist") from None
    except OSError as error:
        raise UserError(f"data folder {root} cannot be read: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        kind = "a file" if stat.S_ISREG(mode) else kind_of_entry(mode)
        raise UserError(f"data folder {root} is {kind}, not a folder")
    return root


def _entries(folder: Path) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield the entries of a folder, each with its kind: "folder", "file", or the reason why it is neither."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.strerror}") from None
    return ((entry, _kind(entry)) for entry in found)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "left by a system" if entry.name in SYSTEM_FOLDERS else "folder"
        return kind_of_entry(entry.stat().st_mode)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link round in a circle"
        # An entry that cannot be reached counts as an unreadable picture if its name says that it is a picture.
        return "file" if Path(entry.name).suffix.lower() in picture_extensions() else error.strerror or "out of reach"


def class_folders(root: Path) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """Return the names of the class folders of a data folder in label order, and its other entries."""
    names: list[str] = []
    skipped: list[Skipped] = []
    entries = _entries(existing_folder(root))
    above = {_identity(folder) for folder in (root, *root.absolute().parents)}
    for entry, kind in entries:
        if kind == "folder" and _identity(root / entry.name) in above:
            skipped.append(Skipped(entry.name, LOOP))
        elif kind == "folder":
            names.append(entry.name)
        else:
            skipped.append(Skipped(entry.name, "in no class folder" if kind == "file" else kind))
    return label_order(names), tuple(skipped)


def label_order(names: Sequence[str]) -> tuple[str, ...]:
    """Return the class folders in the order of their labels.

    The order is that of the names as texts, as in every published list of folders. Names that are all numbers, such as
    ImageNet-V2's 0 ... 999, are sorted by the numbers, because the names of their classes are listed in that order; as
    texts, 10 would come before 2, and -1 before -2.
    """
    if all(is_whole_number(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_number(name: str) -> bool:
    """Return whether a name consists of the digits 0 to 9."""
    return name.isascii() and name.isdigit()


def is_whole_number(name: str) -> bool:
    """Return whether a name consists of the digits 0 to 9, perhaps after a sign."""
    return is_number(name[1:] if name[:1] in ("-", "+") else name)


def pictures_below(folder: Path, root: Path) -> Found:
    """Find the pictures at any depth below a folder, and the other entries there.

    root: the data folder that contains it. Links to folders are followed, except those that lead back into a folder
    above them.
    """
    pictures: list[Path] = []
    skipped: list[Skipped] = []
    pending = [(folder, frozenset({_identity(root)}))]
    while pending:
        current, above = pending.pop()
        if current != root:
            if (own := _identity(current)) in above:
                skipped.append(Skipped(current.relative_to(root).as_posix(), LOOP))
                continue
            above |= {own}
        empty = True
        for entry, kind in _entries(current):
            empty = False
            path = current / entry.name
            if kind == "folder":
                pending.append((path, above))
            elif kind == "file" and is_picture(path):
                pictures.append(path)
            else:
                name = path.relative_to(root).as_posix()
                skipped.append(Skipped(name, "not a picture" if kind == "file" else kind))
        if empty and current not in (folder, root):
            skipped.append(Skipped(current.relative_to(root).as_posix(), "an empty folder"))
    return Found(tuple(sorted(pictures)), tuple(sorted(skipped)))


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino


def mention_skipped(root: Path, skipped: Sequence[Skipped]) -> None:
    """Give one warning of all entries of a data folder that are not used."""
    if not skipped:
        return
    # The message names one entry for every reason first, so that a hundred hidden files do not hide a FIFO.
    one_each: dict[str, Skipped] = {}
    for entry in skipped:
        one_each.setdefault(entry.reason, entry)
    shown = list(dict.fromkeys([*one_each.values(), *skipped]))[:EXAMPLES]
    names = ", ".join(f"{entry.path} ({entry.reason})" for entry in shown)
    more = f" and {len(skipped) - len(shown)} more" if len(skipped) > len(shown) else ""
    entries = "1 entry was" if len(skipped) == 1 else f"{len(skipped)} entries were"
    notices.warn(f"data {root}: {entries} skipped: {names}{more}")


def mention_empty(root: Path, empty: Sequence[str]) -> None:
    """Warn of class folders without a picture, which remain classes."""
    if empty:
        one = len(empty) == 1
        holds = "1 class folder holds" if one else f"{len(empty)} class folders hold"
        stays = "stays a class" if one else "stay classes"
        notices.warn(f"data {root}: {holds} no picture and {stays}: {_some(empty)}")


def deeper_classes(root: Path, pictures: Mapping[str, Sequence[tuple[str, ...]]]) -> str | None:
    """Return why the sub-folders of a data folder cannot be classes and what to give instead, or None where they can.

    pictures: for each class folder with pictures, the parts of their paths below it.

    Warns where the sub-folders may not be classes.
    """
    direct = {folder for folder, paths in pictures.items() if any(len(parts) == 1 for parts in paths)}
    below = {folder: sorted({parts[0] for parts in paths if len(parts) > 1}) for folder, paths in pictures.items()}
    if len(pictures) > 1 and all(SPLIT.fullmatch(folder) for folder in pictures):
        look = f"its sub-folders {_some(list(pictures))} look like parts of a data set"
        if direct:
            return f"{look}; put each class's pictures into a folder of its own"
        return f"{look}; give one of them: {' or '.join(f'imagefolder:{root / folder}' for folder in pictures)}"
    if direct or not pictures:
        return None
    if len(pictures) == 1:
        ((folder, paths),) = pictures.items()
        levels = [sorted(set(names)) for names in zip(*(parts[:-1] for parts in paths), strict=False)]
        depth = next((depth for depth, names in enumerate(levels) if len(names) > 1), None)
        if depth is None:
            return None
        inner = root.joinpath(folder, *(names[0] for names in levels[:depth]))
        return (
            f"all its pictures lie in {len(levels[depth])} sub-folders ({_some(levels[depth])}) of one; did you mean "
            f"imagefolder:{inner}?"
        )
    folder = max(below, key=lambda name: len(below[name]))
    if len(below[folder]) > 1:
        notices.warn(
            f"data {root}: none of the {len(pictures)} class folders ({_some(list(pictures))}) holds a picture itself, "
            f"{folder} has them in sub-folders ({_some(below[folder])}); if those are the classes, give "
            f"imagefolder:{root / folder}"
        )
    return None


def mention_equal_numbers(root: Path, folders: Sequence[str]) -> None:
    """Warn of class folders whose names are the same number, which a list of names by number cannot tell apart."""
    if not all(is_whole_number(folder) for folder in folders):
        return
    pairs = [(one, other) for one, other in pairwise(folders) if int(one) == int(other)]
    if pairs:
        notices.warn(
            f"data {root}: class folders {pairs[0][0]} and {pairs[0][1]} are the same number; they are classes "
            f"{folders.index(pairs[0][0])} and {folders.index(pairs[0][1])}"
        )


def mention_single_class(root: Path, folders: Sequence[str]) -> None:
    """Warn of a data folder with a single class, for which an accuracy says nothing."""
    if len(folders) == 1:
        notices.warn(f"data {root} has one class folder only, {folders[0]}: among its classes every answer is right")


def _some(names: Sequence[str]) -> str:
    more = f", ... {names[-1]}" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
