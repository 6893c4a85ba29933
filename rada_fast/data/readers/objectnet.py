"""ObjectNet: the images of those of its classes that are also ImageNet's, which its own lists name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rada_fast.data.folders import EXAMPLES
from rada_fast.data.layouts import (
    archive_hint,
    contents,
    descend,
    existing_root,
    find_folder,
    is_file,
    is_folder,
    lines_of,
    shown,
)
from rada_fast.data.parts import Part
from rada_fast.data.readers.imagefolder import read_image_folder
from rada_fast.data.readers.imagenet import synsets
from rada_fast.data.sources import ImageFolder
from rada_fast.data.stored import FramedFile
from rada_fast.errors import UserError
from rada_fast.system import notices

FRAME = 2
"""ObjectNet's pictures have a red frame of one pixel. Published results cut off two at each edge."""
CLASSES = 113
"""The number of its classes that are also ImageNet's."""
_ROOTS = ("", "objectnet-1.0/", "objectnet/", "objectnet/objectnet-1.0/", "ObjectNet/", "../")
_LISTS = tuple(f"{root}{folder}" for root in _ROOTS for folder in ("mappings", "objectnet_metadata"))
_IMAGES = (*(f"{root}images" for root in _ROOTS), "objectnet-1.0", "objectnet", "")
_TITLES, _EQUAL = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"
_NUMBERS, _LABELS = "pytorch_to_imagenet_2012_id.json", "imagenet_to_label_2012_v2"


def read_objectnet(path: Path, part: Part) -> ImageFolder:
    """Read ObjectNet's images of the classes that are also ImageNet's.

    path: the folder of the data set (objectnet-1.0), one above it, or its folder of images.

    Raises UserError where its lists or its images are not found. There are no training images.
    """
    existing_root(path, "ObjectNet")
    lists = _find_lists(path)
    titles = {title: folder for folder, title in _object(lists / _TITLES).items()}
    equal = _object(lists / _EQUAL)
    if unknown := [title for title in equal if title not in titles]:
        raise UserError(f"ObjectNet: {lists / _TITLES} has no folder for {', '.join(unknown[:EXAMPLES])}")
    title_of = {titles[title]: title for title in equal}
    images = find_folder(path, _IMAGES, lambda folder: any(is_folder(folder / name) for name in title_of))
    if images is None:
        raise UserError(
            f"ObjectNet: no folder was found whose sub-folders are classes such as {min(title_of)}; looked for "
            f"{shown(path, _IMAGES)}; {path} {contents(path)}{archive_hint(path)}"
        )
    folders = tuple(sorted(title_of))
    ids = _imagenet_ids(lists)
    found = read_image_folder(images, published=True)
    label_of = {folder: label for label, folder in enumerate(folders)}
    new = {label: label_of[folder] for label, folder in enumerate(found.folders) if folder in label_of}
    left_out = len(found.folders) - len(new)
    if left_out:
        notices.note(f"ObjectNet: {left_out} of its {len(found.folders)} classes are not ImageNet's and are left out")
    if missing := [folder for folder in folders if folder not in found.folders]:
        notices.warn(
            f"ObjectNet in {images}: {len(missing)} of its {len(folders)} classes have no folder and stay classes: "
            f"{', '.join(missing[:EXAMPLES])}"
        )
    samples = tuple(
        replace(sample, label=new[sample.label], path=FramedFile(images / sample.id, FRAME))
        for sample in found.samples
        if sample.label in new
    )
    return ImageFolder(
        images,
        folders,
        samples,
        found.skipped,
        names=tuple(title_of[folder].lower() for folder in folders),
        counts_as=tuple(tuple(ids[name.strip()] for name in equal[title_of[key]].split("; ")) for key in folders),
        what="ObjectNet in",
    )


def _find_lists(path: Path) -> Path:
    """Return the folder that holds the four lists of the data set."""
    needed = (_TITLES, _EQUAL, _NUMBERS, _LABELS)
    for place in _LISTS:
        folder = descend(path, place)
        if folder is not None and is_file(folder / _TITLES):
            if missing := [name for name in needed if not is_file(folder / name)]:
                raise UserError(f"ObjectNet: {folder} lacks {', '.join(missing)}, which objectnet-1.0.zip holds")
            return folder
    raise UserError(
        f"ObjectNet: the lists that say which of its classes are ImageNet's were not found; looked for "
        f"{shown(path, _LISTS)}; {path} {contents(path)}{archive_hint(path)}; put {', '.join(needed)} into "
        f"{path / 'mappings'}, as objectnet-1.0.zip has them"
    )


def _object(path: Path) -> dict[str, str]:
    value = _json(path)
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise UserError(f"ObjectNet: {path} must be a JSON object of texts")
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"ObjectNet: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"ObjectNet: {path} is not JSON: {error}") from None


class _Ids(dict[str, str]):
    """The WordNet ids of ImageNet's classes by the names that ObjectNet's lists use."""

    def __missing__(self, name: str) -> str:
        raise UserError(f"ObjectNet: {_LABELS} does not list {name!r}, which {_EQUAL} names")


def _imagenet_ids(lists: Path) -> _Ids:
    """Read the WordNet id of each name: the lines of one list have numbers of 2012, and another gives their labels."""
    numbers, wnids = _json(lists / _NUMBERS), synsets("imagenet")
    usable = isinstance(numbers, dict) and all(
        label.isdigit() and int(label) < len(wnids) and type(number) is int for label, number in numbers.items()
    )
    if not usable:
        raise UserError(f"ObjectNet: {lists / _NUMBERS} must map the labels 0 ... 999 to numbers")
    label_of = {number: int(label) for label, number in numbers.items()}
    names = enumerate(lines_of(lists / _LABELS, "ObjectNet's list"))
    return _Ids({name: wnids[label_of[number]] for number, name in names if number in label_of})
