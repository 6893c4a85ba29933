"""Folders of image files: one sub-folder for each class, at one level or at several, or images without classes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rada_fast.data.folders import (
    SPLIT,
    Found,
    Skipped,
    class_folders,
    deeper_classes,
    existing_folder,
    label_order,
    mention_empty,
    mention_equal_numbers,
    mention_single_class,
    mention_skipped,
    pictures_below,
)
from rada_fast.data.sources import ImageFolder, Sample
from rada_fast.errors import UserError


def read_image_folder(root: Path, *, published: bool = False) -> ImageFolder:
    """Read a folder that has one sub-folder for each class; images may lie at any depth below it.

    published: whether a published list says what the classes are, so that the folders need not be all of them.

    The classes are numbered in the order that `label_order` gives their folders. Raises UserError where there is no
    class, or where the sub-folders are certainly not the classes; warns of everything that is not used.
    """
    folders, skipped = class_folders(root)
    if not folders:
        pictures = pictures_below(root, root).pictures
        hint = f"; for pictures without classes give images:{root}" if pictures else ""
        with suppress(OSError):
            above = root.absolute().parent
            if pictures and sum(path.is_dir() for path in above.iterdir()) > 1:
                hint += f", for the folders beside it as classes imagefolder:{above}"
        raise UserError(f"data folder {root} must have one sub-folder for each class, it has none{hint}")
    found = [pictures_below(root / folder, root) for folder in folders]
    samples = [sample for label, below in enumerate(found) for sample in _samples(below, root, label)]
    if not samples:
        below = f"{len(folders)} sub-folders" if len(folders) > 1 else "1 sub-folder"
        raise UserError(f"data folder {root} has {below} but no image{_others(found)}")
    parts = {
        folder: [path.relative_to(root / folder).parts for path in below.pictures]
        for folder, below in zip(folders, found, strict=True)
        if below.pictures
    }
    fault = deeper_classes(root, parts)
    if fault is not None:
        fault = f"data folder {root} must have one sub-folder for each class, {fault}"
        if len(parts) == len(folders):
            raise UserError(fault)
    skipped += tuple(entry for below in found for entry in below.skipped)
    source = ImageFolder(root, folders, _sorted(samples), skipped, fault)
    if not published:
        mention_single_class(root, folders)
    mention_equal_numbers(root, folders)
    mention_empty(root, source.empty_folders)
    mention_skipped(root, skipped)
    return source


def read_unlabelled_images(root: Path) -> ImageFolder:
    """Read all images below a folder, which have no classes; warns of everything that is not used."""
    found = pictures_below(existing_folder(root), root)
    if not found.pictures:
        raise UserError(f"data folder {root} holds no image{_others([found])}")
    mention_skipped(root, found.skipped)
    return ImageFolder(root, (), _sorted(_samples(found, root, -1)), found.skipped)


def _samples(found: Found, root: Path, label: int) -> list[Sample]:
    return [Sample(path.relative_to(root).as_posix(), path, label) for path in found.pictures]


def _sorted(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.id))


def _others(found: Sequence[Found]) -> str:
    """Return an addition to a message that says what a folder without images contains."""
    skipped = [entry for below in found for entry in below.skipped]
    if not skipped:
        return ""
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f" (found {skipped[0][0]}, {skipped[0][1]}{more})"


def read_nested_folder(root: Path) -> ImageFolder:
    """Read a folder in which every folder that holds pictures itself, at any depth, is a class.

    A class is called by the last part of its path, or, where several classes have the same last part, by all parts from
    the last to the first, as CoOp names SUN397's "a/apartment_building/outdoor" "outdoor apartment building".
    """
    found = pictures_below(existing_folder(root), root)
    inner = [path for path in found.pictures if path.parent != root]
    skipped = found.skipped + tuple(
        Skipped(path.name, "in no class folder") for path in found.pictures if path.parent == root
    )
    if not inner:
        hint = f"; for pictures without classes give images:{root}" if found.pictures else ""
        raise UserError(f"data folder {root} must have pictures in sub-folders, it has none{_others([found])}{hint}")
    first = sorted({path.relative_to(root).parts[0] for path in inner})
    if len(first) > 1 and all(SPLIT.fullmatch(folder) for folder in first):
        raise UserError(
            f"data folder {root} must have classes in its sub-folders, {', '.join(first)} look like parts of a data "
            f"set; give one of them: {' or '.join(f'nested:{root / folder}' for folder in first)}"
        )
    paths = label_order(list(dict.fromkeys(path.parent.relative_to(root).as_posix() for path in inner)))
    last = [path.rpartition("/")[2] for path in paths]
    unique = len(set(last)) == len(last)
    label_of = {path: label for label, path in enumerate(paths)}
    samples = [
        Sample(path.relative_to(root).as_posix(), path, label_of[path.parent.relative_to(root).as_posix()])
        for path in inner
    ]
    mention_skipped(root, skipped)
    mention_single_class(root, paths)
    names = (
        None
        if unique
        else tuple(_from_last_to_first(path, last.count(name)) for path, name in zip(paths, last, strict=True))
    )
    return ImageFolder(root, tuple(last) if unique else paths, _sorted(samples), skipped, names=names)


def _from_last_to_first(path: str, times: int) -> str:
    """Return the name of a class by the path of its folder. times: how many classes have the same last part."""
    parts = path.replace("_", " ").split("/")
    if times == 1:
        return parts[-1]
    # SUN397's outermost folders are the first letters of the names.
    return " ".join(reversed(parts[1:] if len(parts[0]) == 1 else parts))
