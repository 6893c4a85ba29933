"""The names of the classes, from folders, from ImageNet's ids and numbers, or from a file.

Names that no prompt can use are refused, and names that are probably a mistake cause a warning.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from rada_fast.data.folders import EXAMPLES, is_number, is_whole_number
from rada_fast.data.names import WNID, read_names, readable_names
from rada_fast.data.sources import Source
from rada_fast.errors import UserError
from rada_fast.system import notices


def class_names_of(source: Source, file: str | None, *, prompts: bool) -> tuple[str, ...]:
    """Return the names of the classes of some data, in the order of their labels.

    source: the data.
    file: the file that --classes names, or None. If the data have no names, it may name more classes than they use.
    prompts: whether the names will be used in prompts. If so, data without names need a file.

    Raises UserError if prompts need names and there are none, or if the file does not fit the data.
    """
    own, count, data = source.class_names, source.num_classes, source.description
    if source.names is not None and file is None:
        if prompts:
            _warn_of_equal(source.names)
        return source.names
    if own is None and file is None:
        if prompts:
            raise UserError(
                f"--classes must be given, a file with one name per line in the order of the labels: {data} has no "
                "array class_names, and a prompt needs names"
            )
        return tuple(f"class {label}" for label in range(count))
    names = resolve_class_names(own or (), file, prompts=prompts, where=source.class_names_from)
    if own is not None:
        return names
    if len(names) < count:
        raise UserError(f"classes file {file} must hold {count} names, one for each label of {data}, got {len(names)}")
    if len(names) > count and prompts and source.has_classes:
        notices.warn(
            f"classes file {file} holds {len(names)} names, the labels of {data} end at {count - 1}: check that they "
            "number these names"
        )
    return names


def resolve_class_names(
    folders: Sequence[str], file: str | None, *, prompts: bool = True, where: str = "class folders"
) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the folders.

    folders: the names of the class folders, or none if the data have no classes and a file has to name them.
    file: the file of names (see read_names), which lists as many names as there are folders, or gives a name for each
        folder. Without a file, ImageNet's folders (n01440764, ..., or all numbers from 0 to 999) get the names of
        open_clip, and the names of other folders are made readable.
    prompts: whether the names will be used in prompts. If so, numbers are refused, and odd or equal names cause a
        warning.
    where: the words for the folders in a message.

    Raises UserError naming the file, what was expected, and what the file holds.
    """
    if prompts and (blank := [label for label, folder in enumerate(folders) if not folder.strip()]) and file is None:
        raise UserError(
            f"--classes must be given, a file with one name per line: {where} have no name for class {blank[0]}"
        )
    if file is None and not folders:
        raise UserError("--classes must be given, a file with one name per line: these data have no class folders")
    own = readable_names(folders, where if prompts and file is None else None)
    listed = read_names(Path(file).expanduser(), folders) if file is not None else []
    readable = readable_names(list(listed.values()) if isinstance(listed, dict) else listed)
    if file is None:
        return _names_of_folders(folders, own, prompts, where)
    if isinstance(listed, dict):
        names = _names_by_key(dict(zip(listed, readable, strict=True)), folders, file)
    else:
        names = _names_in_order(readable, own, file, where)
    if prompts:
        if not isinstance(listed, dict):
            _warn_of_shuffled(folders, own, names, file)
        _warn_of_numbers(names, f"in {file}")
        _warn_of_equal(names)
    return names


def _names_of_folders(folders: Sequence[str], readable: tuple[str, ...], prompts: bool, where: str) -> tuple[str, ...]:
    """Return the names of the folders, or the names of ImageNet's classes if the folders are ImageNet's.

    folders: the names of the folders.
    readable: the same names made readable for prompts.
    prompts, where: see resolve_class_names.
    """
    if all(is_whole_number(folder) for folder in folders):
        if [int(folder) for folder in folders] == list(range(1000)):
            if prompts:
                notices.note(f"{where} 0 ... 999 are taken for ImageNet's classes, as ImageNet-V2 numbers them")
            return tuple(_imagenet_names().values())
        if prompts:
            raise UserError(
                f"--classes must be given, a file with one name per line in the order of the numbers: {where} are "
                f"numbers ({', '.join(folders[:EXAMPLES])}), which say nothing in a prompt such as "
                f"'a photo of a {folders[0]}.'"
            )
        return tuple(folders)
    ids = [folder for folder in folders if WNID.fullmatch(folder)]
    if not ids:
        if prompts:
            _warn_of_numbers(readable, f"from {where}")
            _warn_of_equal(readable)
        return readable
    known = _imagenet_names()
    foreign = [folder for folder in ids if folder.lower() not in known]
    if prompts and foreign:
        wordnet = _wordnet_names()
        line = f"{foreign[0]} NAME"
        examples = ", ".join(
            f"{id} ({wordnet.get(id.lower(), 'unknown to WordNet, too')})" for id in foreign[:EXAMPLES]
        )
        more = f" and {len(foreign) - EXAMPLES} more" if len(foreign) > EXAMPLES else ""
        fault = (
            f"{len(foreign)} of {len(folders)} {where} are not among ImageNet's 1000 classes, and their ids say "
            f"nothing in a prompt: {examples}{more}"
        )
        if len(foreign) == len(folders):
            raise UserError(f"--classes must be given, a file with lines such as {line!r}: {fault}")
        notices.warn(f"{fault}; give --classes FILE with lines such as {line!r}")
    names = tuple(known.get(folder.lower(), name) for folder, name in zip(folders, readable, strict=True))
    if prompts:
        _warn_of_equal(names)
    return names


def _names_by_key(listed: Mapping[str, str], folders: Sequence[str], file: str) -> tuple[str, ...]:
    """Return the names in the order of the folders, from a file that gives one for each folder or WordNet id.

    Without folders, the names keep the order of the file.
    """
    if not folders:
        return tuple(listed.values())
    by_key = {_key(key): name for key, name in listed.items()}
    keys = {folder: _key(folder) for folder in folders}
    if all(is_number(folder) for folder in folders) and all(WNID.fullmatch(key) for key in listed):
        # ImageNet's classes are numbered in the order of their ids.
        ids = sorted(by_key)
        keys = {folder: ids[int(folder)] if int(folder) < len(ids) else folder for folder in folders}
    if missing := [folder for folder, key in keys.items() if key not in by_key]:
        raise UserError(
            f"classes file {file} must name every class folder, {len(missing)} of {len(folders)} are missing: "
            f"{', '.join(missing[:EXAMPLES])}"
        )
    return tuple(by_key[keys[folder]] for folder in folders)


def _names_in_order(listed: tuple[str, ...], own: tuple[str, ...], file: str, where: str) -> tuple[str, ...]:
    """Return the names in the order of the folders, from a file that lists names or WordNet ids without keys.

    listed: the names or WordNet ids in the file.
    own: the readable names of the folders.
    file: the name of the file, for messages.
    where: the words for the folders in a message.
    """
    names = listed
    if any(WNID.fullmatch(name) for name in listed):
        known = _imagenet_names()
        names = tuple(known.get(name.lower(), name) for name in listed)
    # A name that equals that of a folder belongs to this folder, wherever it stands and whatever else the file lists.
    by_name = {folded(name): name for name in names}
    wanted = [folded(name) for name in own]
    if own and len(by_name) == len(names) and len(set(wanted)) == len(wanted) and by_name.keys() >= set(wanted):
        if [folded(name) for name in names] != wanted:
            notices.note(
                f"classes file {file} lists the names of the {where} in another order, or more names than these; the "
                "names are matched, whatever their order"
            )
        return tuple(by_name[name] for name in wanted)
    if own and len(names) != len(own):
        raise UserError(f"classes file {file} must hold {len(own)} names, one for each class folder, got {len(names)}")
    return names


def _key(folder: str) -> str:
    """Return the key of a class folder. It is the same whether an accented letter is stored as one character or two."""
    return folder.lower() if WNID.fullmatch(folder) else unicodedata.normalize("NFC", folder)


def folded(name: str) -> str:
    """Return a name in a form that does not depend on letter case or on how accented letters are stored."""
    return unicodedata.normalize("NFC", name.casefold())


def _warn_of_shuffled(folders: Sequence[str], own: Sequence[str], names: Sequence[str], file: str) -> None:
    """Warn if the names in a file seem to be in another order than the folders.

    folders: the names of the folders.
    own: the same names made readable, which some names in the file may equal.
    names: the names in the file.
    file: the name of the file.
    """
    place_of = {folded(name): index for index, name in enumerate(own)}
    places = [place_of.get(folded(name)) for name in names]
    for index, name in enumerate(names):
        if places[index] not in (None, index):
            notices.warn(
                f"classes file {file} names class folder {folders[index]!r} {name!r}, which is what class folder "
                f"{folders[place_of[folded(name)]]!r} is called: names must be in the order of the sorted folders"
            )
            return
    natural = sorted(folders, key=_natural)
    if list(folders) != natural and not any(place is not None for place in places):
        first = next(index for index, folder in enumerate(folders) if folder != natural[index])
        if _natural(folders[first])[0::2] == _natural(natural[first])[0::2]:
            notices.warn(
                f"classes file {file} names class folders in text order, in which {folders[first]!r} comes before "
                f"{natural[first]!r}; check that its names are in that order, or give 'folder,name' lines"
            )


def _natural(name: str) -> list[str | int]:
    """Return a key that sorts the numbers in names as numbers: texts at even positions, numbers between them."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def _warn_of_numbers(names: Sequence[str], where: str) -> None:
    """Warn of names that consist of a number, such as "7" or "class 7", and if all names begin with a number."""
    nothing_else = re.compile(r"(?:(?:class|cls|label|category|cat|id|no|nr|c)[ -]?)?\d+", re.IGNORECASE)
    numbered = [name for name in names if nothing_else.fullmatch(name)]
    counted = re.compile(r"(?:[(\[#]|(?:class|label|category|id)[ -]?)?\d+[\s.:,;)\]=|]", re.IGNORECASE)
    if not numbered and len(names) > 1 and all(counted.match(name) for name in names):
        numbered = list(names)
    if numbered:
        notices.warn(
            f"{len(numbered)} of {len(names)} class names {where} are or begin with numbers, which say nothing in a "
            f"prompt ({', '.join(map(repr, numbered[:EXAMPLES]))}); give the classes' own names, --classes FILE"
        )


def _warn_of_equal(names: Sequence[str]) -> None:
    """Warn of names that occur more than once, because prompts cannot tell their classes apart."""
    counts = Counter(" ".join(folded(name).split()) for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if not twice:
        return
    shown = ", ".join(map(repr, twice[:EXAMPLES])) + (", ..." if len(twice) > EXAMPLES else "")
    message = f"class names occur more than once, and their classes cannot be told apart: {shown}"
    imagenet = Counter(_imagenet_names().values())
    if all(imagenet[name] == counts[name] for name in twice):
        # ImageNet's own list has two names twice, and all published results include these ties.
        notices.note(message)
    else:
        notices.warn(message)


@cache
def _imagenet_names() -> dict[str, str]:
    """Return open_clip's names of ImageNet's classes by WordNet id, in label order."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


@cache
def _wordnet_names() -> dict[str, str]:
    """Return WordNet's names of the classes of the large ImageNet by WordNet id."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return {name: info.label_name_to_description(name, detailed=False) for name in info.label_names()}
