"""ImageNet and its variants, under every name that CoOp, RAda, TPT and FLYP give their folders."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rada_fast.data.few_shot import PublishedShots
from rada_fast.data.folders import EXAMPLES, Skipped, is_number
from rada_fast.data.layouts import (
    archive_hint,
    contents,
    entries,
    existing_root,
    find_folder,
    is_file,
    lines_of,
    nearby,
    shown,
    sub_folders,
)
from rada_fast.data.names import WNID
from rada_fast.data.parts import Part
from rada_fast.data.published import plain
from rada_fast.data.readers.imagefolder import read_image_folder
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.system import notices


class ImageNetKind(NamedTuple):
    """ImageNet or one of its variants.

    kind: its name in KIND:PATH.
    title: its name in messages.
    synsets: the list of its classes in timm.
    images: the places of its images below the folder that is given, by part; only ImageNet has training images.
    total: the number of its test images.
    each: the number of test images of each class, where all have the same.
    numbered: whether its folders are the numbers of the classes.
    """

    kind: str
    title: str
    synsets: str
    images: dict[Part, tuple[str, ...]]
    total: int
    each: int | None = None
    numbered: bool = False

    def places(self, part: Part) -> tuple[str, ...]:
        """Return the places of the images of a part. The last one is the folder itself."""
        return (*(self.images.get(part) or self.images["test"]), "")


_IMAGENET = ("imagenet/", "", "ILSVRC2012/", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/", "imagenet-1k/")
_PARENTS = tuple(f"{above}{images}" for images in ("images/", "") for above in _IMAGENET)
_VAL_FOLDERS = ("val_dirs", "val_in_folder", "val", "validation")


def _variant(*folders: str) -> dict[Part, tuple[str, ...]]:
    return {"test": folders}


IMAGENET_KINDS = (
    ImageNetKind(
        "imagenet",
        "ImageNet",
        "imagenet",
        {
            "train": tuple(f"{above}train" for above in _PARENTS),
            "test": tuple(f"{above}{folder}" for above in _PARENTS for folder in _VAL_FOLDERS),
        },
        50_000,
        50,
    ),
    ImageNetKind(
        "imagenet-v2",
        "ImageNet-V2",
        "imagenet",
        _variant(
            "imagenetv2/imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency-format-val",
            "imagenet-v2/imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
            "imagenetv2/imagenetv2-matched-frequency",
            "imagenetv2",
            "imagenet-v2",
        ),
        10_000,
        10,
        numbered=True,
    ),
    ImageNetKind(
        "imagenet-sketch",
        "ImageNet-Sketch",
        "imagenet",
        _variant("imagenet-sketch/images", "imagenet-sketch/sketch", "imagenet-sketch", "images", "sketch"),
        50_889,
    ),
    ImageNetKind(
        "imagenet-a",
        "ImageNet-A",
        "imagenet_a",
        _variant("imagenet-adversarial/imagenet-a", "imagenet-a/imagenet-a", "imagenet-a", "imagenet-adversarial"),
        7_500,
    ),
    ImageNetKind(
        "imagenet-r",
        "ImageNet-R",
        "imagenet_r",
        _variant("imagenet-rendition/imagenet-r", "imagenet-r/imagenet-r", "imagenet-r", "imagenet-rendition"),
        30_000,
    ),
)
_OTHER_NAMES = {"imagenetadversarial": "imagenet-a", "imagenetrendition": "imagenet-r", "ilsvrc2012": "imagenet"}
TRAINING_COUNT = 1_281_167
"""The number of ImageNet's training images."""


def imagenet_kind(name: str) -> ImageNetKind | None:
    """Return the kind that a folder or a project calls by this name, or None."""
    wanted = _OTHER_NAMES.get(plain(name), plain(name))
    return next((kind for kind in IMAGENET_KINDS if plain(wanted) == plain(kind.kind)), None)


def imagenet_reader(name: str) -> Callable[[Path, Part], ImageFolder]:
    """Return the function that reads a kind."""
    (kind,) = (kind for kind in IMAGENET_KINDS if kind.kind == name)
    return lambda path, part: read_imagenet(kind, path, part)


@cache
def synsets(name: str) -> tuple[str, ...]:
    """Return the WordNet ids of a list of classes, "imagenet", "imagenet_a" or "imagenet_r", in label order.

    The lists are those that timm ships. They are read without importing timm, which takes seconds.
    """
    spec = find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "_info" / f"{name}_synsets.txt"
    return tuple(lines_of(path, "timm's list of classes"))


def read_imagenet(kind: ImageNetKind, path: Path, part: Part) -> ImageFolder:
    """Read ImageNet or one of its variants. Its classes are the published ones, in their order.

    path: the folder of the images, or a folder above it under the names that projects use.

    Raises UserError where no such folder is found, or where its sub-folders are other classes.
    """
    folder = image_folder(kind, path, part)
    found = read_image_folder(folder, published=True)
    wnids = synsets(kind.synsets)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    keys = [_key(name, kind, wnids) for name in found.folders]
    _check_classes(kind, folder, found, keys, labels)
    new = {label: labels[key] for label, key in enumerate(keys) if key in labels}
    samples = found.samples
    if keys != list(wnids):
        samples = tuple(replace(sample, label=new[sample.label]) for sample in samples if sample.label in new)
    skipped = found.skipped + tuple(
        Skipped(name, f"no class of {kind.title}")
        for name, key in zip(found.folders, keys, strict=True)
        if key not in labels
    )
    source = ImageFolder(folder, wnids, samples, skipped, what=f"{kind.title} in", names=_classnames(folder, wnids))
    if part == "train" and kind.kind == "imagenet":
        above = folder.parent.parent if folder.parent.name == "images" else folder.parent
        return replace(source, published_shots=PublishedShots(samples, (), part, above, above / "preprocessed.pkl"))
    return source


def image_folder(kind: ImageNetKind, path: Path, part: Part) -> Path:
    """Find the folder that holds the class folders. Raises UserError where there is none."""
    existing_root(path, kind.title)

    def fits(folder: Path) -> bool:
        return bool(class_like(folder, kind))

    found = find_folder(path, kind.places(part), fits)
    if found is not None:
        return found
    wanted = "the numbers 0 ... 999" if kind.numbered else f"WordNet ids such as {synsets(kind.synsets)[0]}"
    flat = find_folder(path, kind.places(part), _holds_pictures)
    hint = archive_hint(path)
    other_parts = _VAL_FOLDERS if part == "train" else ("train",)
    if class_like(above := path.absolute().parent, kind):
        hint = f"; did you mean {kind.kind}:{above}?"
    elif flat is not None and kind.kind == "imagenet":
        hint = (
            f"; the pictures in {flat} must be moved into one folder for each class, as the script valprep.sh of "
            "PyTorch's ImageNet example does"
        )
    elif (near := nearby(path, lambda folder: folder.name not in other_parts and fits(folder))) is not None:
        hint = f"; did you mean {kind.kind}:{near}?"
    raise UserError(
        f"{kind.title}: no folder was found whose sub-folders are {wanted}; looked for "
        f"{shown(path, kind.places(part))}; {path} {contents(path)}{hint}"
    )


def class_like(folder: Path, kind: ImageNetKind) -> list[str]:
    """Return the sub-folders whose names look like classes of a kind."""
    names = [below.name for below in sub_folders(folder)]
    return [name for name in names if WNID.fullmatch(name) or (kind.numbered and is_number(name))]


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in (".jpeg", ".jpg", ".png") for path in entries(folder))


def _key(name: str, kind: ImageNetKind, wnids: tuple[str, ...]) -> str:
    """Return the WordNet id of a class folder. The folders of ImageNet-V2 are the numbers of the classes."""
    if kind.numbered and is_number(name):
        return wnids[int(name)] if len(name) < 10 and int(name) < len(wnids) else name
    return name.lower() if WNID.fullmatch(name) else name


def _check_classes(
    kind: ImageNetKind, folder: Path, found: ImageFolder, keys: list[str], labels: Collection[str]
) -> None:
    """Raise UserError where folders are classes of other data; warn of missing classes."""
    foreign = [
        name
        for name, key in zip(found.folders, keys, strict=True)
        if key not in labels and (WNID.fullmatch(name) or is_number(name))
    ]
    present = {key for key in keys if key in labels}
    others = [
        other
        for other in IMAGENET_KINDS
        if other.synsets != kind.synsets and {*present, *foreign} <= set(synsets(other.synsets))
    ]
    if foreign or not present:
        like = " or ".join(f"{other.kind}:{folder}" for other in others)
        raise UserError(
            f"{kind.title}: {len(foreign) or len(keys)} of the {len(keys)} class folders in {folder} are not among its "
            f"{len(labels)} classes: {', '.join((foreign or list(found.folders))[:EXAMPLES])}"
            + (f"; did you mean {like}?" if like else "")
        )
    if len(present) < len([key for key in keys if key in labels]):
        raise UserError(f"{kind.title}: several class folders in {folder} are the same class")
    if len(present) < len(labels):
        missing = [wnid for wnid in labels if wnid not in present]
        same = [other for other in others if present == set(synsets(other.synsets))]
        hint = f"; its classes are those of {same[0].title}: did you mean {same[0].kind}:{folder}?" if same else ""
        notices.warn(
            f"{kind.title} in {folder}: {len(missing)} of its {len(labels)} classes have no folder and stay classes: "
            f"{', '.join(missing[:EXAMPLES])}{hint or f'; for the present ones alone give imagefolder:{folder}'}"
        )


def _classnames(folder: Path, wnids: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names in CoOp's classnames.txt ("n01440764 tench"), where it lies beside the images, or None."""
    for above in (folder.parent, folder.parent.parent):
        path = above / "classnames.txt"
        if is_file(path):
            names = dict(line.split(" ", 1) for line in lines_of(path, "list of class names") if " " in line)
            if missing := [wnid for wnid in wnids if wnid not in names]:
                notices.warn(f"{path} has no name for {len(missing)} classes, such as {missing[0]}, and is not used")
                return None
            return tuple(" ".join(names[wnid].split()) for wnid in wnids)
    return None
