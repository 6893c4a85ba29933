"""The data sets of CoOp with their published split into training, validation and test images."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rada_fast.data.few_shot import PublishedShots
from rada_fast.data.folders import EXAMPLES
from rada_fast.data.layouts import (
    archive_hint,
    contents,
    descend,
    entries,
    existing_root,
    is_file,
    is_folder,
    lines_of,
    shown,
)
from rada_fast.data.parts import PARTS, Part
from rada_fast.data.published import AIRCRAFT, COOP_SETS, CoopSet, coop_set
from rada_fast.data.readers.features import MAX_CLASSES
from rada_fast.data.readers.imagenet import imagenet_kind, read_imagenet
from rada_fast.data.sources import ImageFolder, Sample
from rada_fast.data.stored import AbsentFile
from rada_fast.errors import UserError
from rada_fast.system import notices

SPLIT_PLACES = ("", "..", "../data_splits", "../data/data_splits")
"""The places of the split file, seen from the folder of the data set: CoOp's, and those of TPT's checkout."""
PROBED = 50
"""As many listed images are looked for to find out which folder holds the images."""
DOWNLOADS = "CoOp's DATASETS.md links to it"


class Listed(NamedTuple):
    """An image as a split file lists it: its path below the image folder, its label, and the name of its class."""

    path: str
    label: int
    class_name: str


Split = dict[Part, list[Listed]]


class CoopFolder(NamedTuple):
    """The folder of a data set of CoOp.

    known: what is published about the set.
    folder: the folder of the set.
    images: the folder that the listed paths start from.
    split_path: the file that lists the images.
    split: the listed images by part.
    names: the names of the classes, in label order.
    """

    known: CoopSet
    folder: Path
    images: Path
    split_path: Path
    split: Split
    names: tuple[str, ...]


def read_coop(path: Path, part: Part) -> ImageFolder:
    """Read a part of a data set of CoOp, or ImageNet or one of its variants as CoOp lays them out.

    path: ROOT/NAME, where NAME is the folder of the set or any name that CoOp, RAda or TPT give it.

    Raises UserError where the set, its images or its split file are not found, or where the split is not usable.
    """
    existing_root(path.parent, "coop:ROOT/NAME")
    if coop_set(path.name) is None and not (is_folder(path) and any(_split_files(path))):
        kind = imagenet_kind(path.name)
        if kind is not None:
            return read_imagenet(kind, path if is_folder(path) else path.parent, part)
    opened = open_coop(path)
    samples = {name: _samples(opened, name) for name in PARTS}
    _check_files(opened, part)
    rule = PublishedShots(samples["train"], samples["val"], part, opened.folder) if part != "test" else None
    return ImageFolder(
        opened.folder,
        unique_keys(opened.names),
        samples[part],
        names=tuple(" ".join(name.replace("_", " ").split()) for name in opened.names),
        published_shots=rule,
        what=f"{opened.known.name} in",
    )


def _samples(opened: CoopFolder, part: Part) -> tuple[Sample, ...]:
    images = opened.split[part]
    listed = [image.path for image in images]
    absent = frozenset(missing_images(opened.images, listed))
    return tuple(
        Sample(id, AbsentFile(file) if image.path in absent else file, image.label)
        for id, image in zip(unique_ids(listed), images, strict=True)
        for file in (opened.images / image.path,)
    )


def open_coop(path: Path) -> CoopFolder:
    """Find a data set of CoOp, its images and its split, and read the split. Raises UserError as read_coop does."""
    known = coop_set(path.name)
    places = [path.name] if known is None else list(dict.fromkeys((path.name, *known.folders)))
    if known is None:
        known = _identified(path)
    folder = next((found for place in places if (found := descend(path.parent, place)) and is_folder(found)), None)
    if folder is None:
        raise UserError(
            f"{known.name}: no folder of it was found; looked for {shown(path.parent, places)}; {path.parent} "
            f"{contents(path.parent)}{archive_hint(path.parent)}"
        )
    if known.name == AIRCRAFT:
        split_path, split, names = _read_aircraft(folder)
    else:
        split_path = _find_split(known, folder)
        split, names = read_split(split_path)
    images = _image_folder(known, folder, split)
    opened = CoopFolder(known, folder, images, split_path, split, names)
    _check_links(opened)
    return opened


def _split_files(folder: Path) -> list[CoopSet]:
    """Return the sets whose split files lie in a folder."""
    names = {path.name.casefold() for path in entries(folder)}
    found = [known for known in COOP_SETS if known.split_file.casefold() in names]
    if {"variants.txt", "images_variant_train.txt"} <= names:
        found += [known for known in COOP_SETS if known.name == AIRCRAFT]
    return found


def _identified(path: Path) -> CoopSet:
    """Return the data set whose split file lies in a folder of any name. Raises UserError where none or several do."""
    names = ", ".join([*(known.folders[0] for known in COOP_SETS), "imagenet"])
    if is_folder(path):
        found = _split_files(path)
        if len(found) == 1:
            return found[0]
        inner = [below.name for below in entries(path) if coop_set(below.name) is not None or _split_files(below)]
        above = path.absolute().parent
        near = path / inner[0] if inner else above if coop_set(above.name) or _split_files(above) else None
        hint = f"; did you mean coop:{near}?" if near is not None else ""
        several = f"the split files of {len(found)} sets" if found else "no split_zhou_*.json"
        raise UserError(
            f"data folder {path} must be one of CoOp's sets ({names}) or hold the split file of one, it has "
            f"{several}; it {contents(path)}{hint}"
        )
    raise UserError(f"coop:ROOT/NAME must name one of CoOp's sets ({names}), got {path.name!r}, and {path} "
                    "does not exist")  # fmt: skip


def _find_split(known: CoopSet, folder: Path) -> Path:
    for place in SPLIT_PLACES:
        candidate = descend(folder, f"{place}/{known.split_file}")
        if candidate is not None and is_file(candidate):
            return candidate
    raise UserError(
        f"{known.name}: its split file was not found; looked for "
        f"{shown(folder, [f'{place}/{known.split_file}'.lstrip('/') for place in SPLIT_PLACES])}; {folder} "
        f"{contents(folder)}; put {known.split_file} into {folder} ({DOWNLOADS})"
    )


def read_split(path: Path) -> tuple[Split, tuple[str, ...]]:
    """Read a split file, {"train" | "val" | "test": [[path, label, class name], ...]}, and the names of the classes.

    Raises UserError where the file has another form, a path leads out of the folder, or the labels and the names do not
    fit together.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"split file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"split file {path} is not JSON: {error}") from None
    if isinstance(value, dict):
        value.setdefault("val", [])  # some splits that are made like CoOp's have no validation images
    if not isinstance(value, dict) or not all(isinstance(value.get(part), list) for part in PARTS):
        raise UserError(f"split file {path} must be an object with the lists train, val and test")
    split: Split = {part: [_listed(path, part, row, entry) for row, entry in enumerate(value[part])] for part in PARTS}
    return split, _names_by_label(path, split)


def _listed(path: Path, part: Part, row: int, entry: Any) -> Listed:
    """Check an entry of a split file, which comes from somebody else."""
    where = f"split file {path}: entry {row} of {part}"
    if not isinstance(entry, list) or len(entry) != 3:
        raise UserError(f"{where} must be [path, label, class name], got {repr(entry)[:100]}")
    image, label, name = entry
    if not isinstance(image, str) or type(label) is not int or not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} must be [path, label, class name], got {repr(entry)[:100]}")
    if not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where} has the label {label}, which must lie in 0 ... {MAX_CLASSES - 1}")
    check_relative(image, where)
    return Listed(str(PurePosixPath(image.replace("\\", "/"))), label, name)


def check_relative(image: str, where: str) -> None:
    """Raise UserError where a listed path is absolute or leads out of its folder."""
    parts = PurePosixPath(image.replace("\\", "/")).parts
    if not parts or "\0" in image or parts[0] in ("/", "//") or ".." in parts or parts[0].endswith(":"):
        raise UserError(f"{where} leads out of the folder of the images: {image!r}")


def _names_by_label(path: Path, split: Split) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for part, images in split.items():
        for image in images:
            if names.setdefault(image.label, image.class_name) != image.class_name:
                raise UserError(
                    f"split file {path} calls the label {image.label} {names[image.label]!r} and, in {part}, "
                    f"{image.class_name!r}"
                )
    if not names:
        raise UserError(f"split file {path} lists no image")
    if missing := [label for label in range(max(names) + 1) if label not in names]:
        raise UserError(
            f"split file {path} must number its {len(names)} classes 0 ... {len(names) - 1}, the largest label is "
            f"{max(names)} and {missing[0]} is missing"
        )
    return tuple(names[label] for label in range(len(names)))


def _read_aircraft(folder: Path) -> tuple[Path, Split, tuple[str, ...]]:
    """Read the lists of FGVC Aircraft: variants.txt, and images_variant_PART.txt with "number variant" lines."""
    lists = {part: folder / f"images_variant_{part}.txt" for part in PARTS}
    for path in (folder / "variants.txt", *lists.values()):
        if not is_file(path):
            inner = descend(folder, "data/variants.txt") or descend(folder, "fgvc-aircraft-2013b/data/variants.txt")
            hint = f"; did you mean coop:{inner.parent}?" if inner is not None else archive_hint(folder)
            raise UserError(f"{AIRCRAFT}: {path} was not found; {folder} {contents(folder)}{hint}")
    names = tuple(lines_of(folder / "variants.txt", "list of classes"))
    labels = {name: label for label, name in enumerate(names)}
    split: Split = {}
    for part, path in lists.items():
        split[part] = []
        for row, line in enumerate(lines_of(path, "list of images")):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise UserError(f"list of images {path}: line {row + 1} has {name!r}, which variants.txt does not list")
            check_relative(image, f"list of images {path}: line {row + 1}")
            split[part].append(Listed(f"{image}.jpg", labels[name], name))
    return folder / "variants.txt", split, names


def _image_folder(known: CoopSet, folder: Path, split: Split) -> Path:
    """Return the folder that holds most of the first listed images."""
    listed = [image.path for part in PARTS for image in split[part][:PROBED]]
    candidates = [found for place in known.images if (found := descend(folder, place)) and is_folder(found)]
    counts = {place: sum(is_file(place / image) for image in listed) for place in candidates}
    best = max(counts, key=lambda place: counts[place], default=None)
    if best is None or not counts[best]:
        raise UserError(
            f"{known.name}: none of the first listed images, such as {listed[0]!r}, was found below "
            f"{shown(folder, known.images)}; {folder} {contents(folder)}{archive_hint(folder)}"
        )
    return best


def _check_links(opened: CoopFolder) -> None:
    """Raise UserError where a listed image or a folder above it is a link that leads out of the data set.

    The folder of the set, its image folder and the folders right below that may be links themselves, because users are
    told to make them.
    """
    folder, images = opened.folder, opened.images
    roots = {folder.resolve(), images.resolve()}
    if images == folder:
        roots |= {below.resolve() for below in entries(folder) if below.is_symlink()}
    above: dict[str, Path] = {}
    for part, listed in opened.split.items():
        found = listing(images, [image.path for image in listed])
        for image in listed:
            parent, _, name = image.path.rpartition("/")
            if parent not in above:
                above[parent] = (images / parent).resolve()
            path = above[parent] / name
            if found[parent].get(name, False):
                path = path.resolve()
            if not any(path.is_relative_to(root) for root in roots):
                raise UserError(
                    f"split file {opened.split_path}: {image.path!r} of {part} is a link that leads out of {folder}, "
                    f"to {path}"
                )


def _check_files(opened: CoopFolder, part: Part) -> None:
    """Warn of listed images that do not exist; they are recorded as unreadable images."""
    listed = [image.path for image in opened.split[part]]
    if not listed:
        raise UserError(f"{opened.known.name}: split file {opened.split_path} has no picture of {part}")
    missing = missing_images(opened.images, listed)
    if missing and len(missing) == len(listed):
        raise UserError(
            f"{opened.known.name}: none of the {len(listed)} images of {part} exists below {opened.images}, the first "
            f"is {missing[0]!r}"
        )
    if missing:
        notices.warn(
            f"{opened.known.name}: {len(missing)} of the {len(listed)} images of {part} do not exist below "
            f"{opened.images} and will count as unreadable: {', '.join(missing[:EXAMPLES])}"
        )


def missing_images(root: Path, listed: Sequence[str]) -> list[str]:
    """Return the listed paths that do not exist below a folder."""
    found = listing(root, listed)
    return [path for path in listed if path.rpartition("/")[2] not in found[path.rpartition("/")[0]]]


def listing(root: Path, listed: Sequence[str]) -> dict[str, dict[str, bool]]:
    """List every folder of the listed paths once. Returns, by folder, whether each of its entries is a link."""
    found: dict[str, dict[str, bool]] = {}
    for above in dict.fromkeys(path.rpartition("/")[0] for path in listed):
        try:
            with os.scandir(root / above) as folder:
                found[above] = {entry.name: entry.is_symlink() for entry in folder}
        except OSError:
            found[above] = {}
    return found


def unique_ids(paths: Sequence[str]) -> list[str]:
    """Return an id for each listed path: the path itself, with a number where a list repeats it."""
    counts: dict[str, int] = {}
    ids = []
    for path in paths:
        counts[path] = counts.get(path, 0) + 1
        ids.append(path if counts[path] == 1 else f"{path}#{counts[path]}")
    return ids


def unique_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return a key for each class: its name, with its label where several classes have the name."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({label})" for label, name in enumerate(names))
