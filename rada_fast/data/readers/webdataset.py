"""WebDataset shards: tar archives that hold each picture beside a file with its label. Nothing is extracted."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rada_fast.data.decode import picture_extensions
from rada_fast.data.folders import EXAMPLES, Skipped, mention_skipped
from rada_fast.data.layouts import contents, entries, is_file, is_folder, lines_of
from rada_fast.data.parts import Part
from rada_fast.data.readers.coop import unique_keys
from rada_fast.data.readers.features import MAX_CLASSES
from rada_fast.data.sources import ImageFolder, Sample
from rada_fast.data.stored import TarMember, open_regular
from rada_fast.errors import UserError
from rada_fast.system import notices

MOST_SHARDS = 100_000
MOST_LABEL_BYTES = 2**20
"""A label file that is larger than this is refused."""
PART_FOLDERS: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "val", "validation", "valid"),
}
"""The names of the folders of a part. CLIP_benchmark writes train and test."""
NAME_FILES = ("classnames.txt", "classes.txt")
_NUMBER_KEYS = ("label", "cls", "class_id", "class_index", "label_id", "target")
_NAME_KEYS = ("class_name", "classname", "label_name", "class", "category")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")
"""The first bytes of files that gzip, bzip2, xz and zstd have compressed."""
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GROUP = re.compile(r"\{([^{}]*)\}")


@dataclass
class _Entry:
    """The members of an archive that belong together, because their names are equal up to the first dot.

    pictures: the pictures among them; number, name: the label that a file of them states; numbered_by: the member that
        states the number; caption: whether the name is a text that may describe the picture instead of its class;
        others: the other members.
    """

    pictures: list[TarMember] = field(default_factory=list)
    number: int | None = None
    name: str | None = None
    numbered_by: str = ""
    caption: bool = False
    others: list[str] = field(default_factory=list)


def expand(pattern: str) -> list[str]:
    """Return the texts that a pattern with braces stands for: {00..12} counts, and {a,b} lists.

    Raises UserError where there are too many.
    """
    texts = [pattern]
    while any(_choices(text) for text in texts):
        expanded: list[str] = []
        for text in texts:
            found = _choices(text)
            if found is None:
                expanded.append(text)
                continue
            match, choices = found
            if len(expanded) + len(choices) > MOST_SHARDS:
                raise UserError(f"pattern {pattern!r} stands for more than {MOST_SHARDS} archives")
            expanded += [text[: match.start()] + choice + text[match.end() :] for choice in choices]
        texts = expanded
    return texts


def _choices(text: str) -> tuple[re.Match[str], Sequence[str]] | None:
    """Return the first innermost group of braces that is a range or a list, and what it may stand for."""
    for match in _GROUP.finditer(text):
        if (limits := _RANGE.fullmatch(match[1])) is not None:
            first, last = int(limits[1]), int(limits[2])
            width = max(len(limits[1]), len(limits[2])) if limits[1][0] == "0" or limits[2][0] == "0" else 0
            if abs(last - first) >= MOST_SHARDS:
                raise UserError(f"pattern {text!r} stands for more than {MOST_SHARDS} archives")
            step = 1 if first <= last else -1
            return match, [f"{number:0{width}d}" for number in range(first, last + step, step)]
        if "," in match[1]:
            return match, match[1].split(",")
    return None


def read_shards(pattern: Path, part: Part) -> ImageFolder:
    """Read the pictures of tar archives.

    pattern: the path of an archive; with {000..009}, {a,b} or * the paths of several; or a folder of archives, which
        may have folders named train, val and test.

    A picture's label is a number in a file .cls, or a number or a name in a file .json or .txt beside it. The names of
    the classes are read from classnames.txt beside the archives or in the folder above. Members are read where they lie
    in the archive; their names are never used as paths.

    Raises UserError where an archive is missing, compressed or damaged, or where only some of the pictures have labels.
    """
    shards = _shards(pattern, part)
    found: list[tuple[str, _Entry]] = []
    for shard in shards:
        names = f"{shard.name}/" if len(shards) > 1 else ""
        found += [(f"{names}{key}", entry) for key, entry in _entries(shard).items()]
    skipped = tuple(
        Skipped(name, "beside no picture" if not entry.pictures else "not a picture or a label")
        for _, entry in found
        for name in entry.others + ([entry.numbered_by] if entry.numbered_by and not entry.pictures else [])
    )
    with_pictures = [(key, entry) for key, entry in found if entry.pictures]
    if not with_pictures:
        raise UserError(f"webdataset {pattern}: the {len(shards)} archives hold no picture")
    folder = shards[0].parent
    classes = _classes([entry for _, entry in with_pictures], folder, pattern)
    samples = []
    for (key, entry), label in zip(with_pictures, classes.labels, strict=True):
        for picture in entry.pictures:
            ending = "." + picture.member.rpartition("/")[2].partition(".")[2]
            samples.append(Sample(key + ending, picture, label))
    if len({sample.id for sample in samples}) < len(samples):
        raise UserError(f"webdataset {pattern}: two archives have the same name and hold pictures of the same name")
    mention_skipped(folder, skipped)
    return ImageFolder(folder, classes.keys, tuple(samples), skipped, names=classes.names, what="webdataset in")


def _shards(pattern: Path, part: Part) -> list[Path]:
    """Return the archives that a pattern stands for."""
    text = str(pattern)
    if re.match(r"[a-z][a-z0-9+]*:", text):
        raise UserError(f"webdataset reads archives on disk, got {text!r}: download them first")
    if is_folder(pattern):
        inner = [pattern / name for name in PART_FOLDERS[part]]
        folders = [folder for folder in inner if is_folder(folder)][:1] or [pattern]
        shards = [path for path in entries(folders[0]) if path.suffix.lower() == ".tar"]
        other = [name for names in PART_FOLDERS.values() for name in names if is_folder(pattern / name)]
        if not shards and other:
            raise UserError(f"webdataset: {pattern} has no folder for {part}, it has {', '.join(dict.fromkeys(other))}")
        if not shards:
            raise UserError(f"webdataset: {folders[0]} holds no .tar archive; it {contents(folders[0])}")
        return sorted(shards, key=lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", path.name)])
    shards = []
    for one in expand(text):
        path = Path(one)
        if any(character in path.name for character in "*?["):
            matching = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
            if not matching:
                raise UserError(f"webdataset: no archive matches {path}; {path.parent} {contents(path.parent)}")
            shards += matching
        else:
            shards.append(path)
    missing = [path for path in shards if not is_file(path)]
    if missing:
        above = missing[0].parent
        raise UserError(
            f"webdataset: {len(missing)} of {len(shards)} archives do not exist: "
            f"{', '.join(map(str, missing[:EXAMPLES]))}; {above} {contents(above)}"
        )
    if len(set(shards)) < len(shards):
        raise UserError(f"webdataset: {pattern} names an archive twice")
    return shards


def _entries(shard: Path) -> dict[str, _Entry]:
    """Return the members of an archive, those that belong together in one entry."""
    found: dict[str, _Entry] = {}
    seen: set[str] = set()
    try:
        with open_regular(shard) as start:
            if start.read(4).startswith(_COMPRESSED):
                raise UserError(f"webdataset: {shard} is compressed; decompress it first, as with gzip -d or zstd -d")
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                place = member.name.removeprefix("./")
                above, _, file = place.rpartition("/")
                base, _, ending = file.partition(".")
                key = f"{above}/{base}" if above else base
                entry = found.setdefault(key, _Entry())
                if place in seen:
                    raise UserError(f"webdataset: {shard} holds {place!r} twice")
                seen.add(place)
                suffix = "." + ending.rpartition(".")[2].lower()
                # macOS puts a file ._NAME beside each file into its archives.
                if not member.isreg() or member.sparse is not None or not ending or file.startswith("._"):
                    entry.others.append(f"{shard.name}/{member.name}")
                elif suffix in picture_extensions():
                    entry.pictures.append(TarMember(shard, place, member.offset_data, member.size))
                elif suffix in (".cls", ".json", ".txt"):
                    _read_label(archive, member, suffix, entry, shard)
                else:
                    entry.others.append(f"{shard.name}/{member.name}")
            _check_end(archive, shard)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"webdataset: {shard} is not a whole tar archive: {error}") from None
    except OSError as error:
        raise UserError(f"webdataset: {shard} cannot be read: {error.strerror or error}") from None
    return found


def _check_end(archive: tarfile.TarFile, shard: Path) -> None:
    """Check that an archive ends where the reading of its members did: tarfile ends silently at a damaged one."""
    with shard.open("rb") as file:
        file.seek(archive.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if not block:
        notices.warn(f"webdataset: {shard} has no end mark; it may have been cut off")
    elif block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {archive.offset}")


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, entry: _Entry, shard: Path) -> None:
    """Read a label file into the entry. A text that is no number is the name of a class."""
    where = f"webdataset: {shard}: {member.name}"
    if member.size > MOST_LABEL_BYTES:
        raise UserError(f"{where} has {member.size} bytes, which no label has")
    file = archive.extractfile(member)
    assert file is not None
    try:
        text = file.read().decode("utf-8").strip()
        value = json.loads(text) if suffix == ".json" else text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable: {error}") from None
    if suffix == ".json":
        fields: dict[str, Any] = value if isinstance(value, dict) else {"label": value}
        number = next((int(fields[key]) for key in _NUMBER_KEYS if _is_whole(fields.get(key))), None)
        name = next((fields[key] for key in (*_NAME_KEYS, *_NUMBER_KEYS) if isinstance(fields.get(key), str)), None)
    else:
        number = int(text) if re.fullmatch(r"\d{1,9}", text) else None
        name = text if number is None and text else None
        if suffix == ".cls" and number is None:
            raise UserError(f"{where} must hold the number of a class, got {text[:40]!r}")
    if number is not None and not 0 <= number < MAX_CLASSES:
        raise UserError(f"{where} has the label {number}, which must lie in 0 ... {MAX_CLASSES - 1}")
    if number is not None:
        stated = suffix != ".txt" and not entry.numbered_by.endswith(".txt")
        if stated and entry.number not in (None, number):
            raise UserError(
                f"{where} has the label {number}, {entry.numbered_by} the label {entry.number}; they belong together, "
                "because their names are equal up to the first dot"
            )
        if suffix != ".txt" or entry.number is None:
            entry.number, entry.numbered_by = number, f"{shard.name}/{member.name}"
    if name is not None and (suffix != ".txt" or entry.name is None):
        entry.name, entry.caption = name, suffix == ".txt"


def _is_whole(value: Any) -> bool:
    """Return whether a value of JSON is a whole number, which some programs write as 1.0."""
    return type(value) is int or (type(value) is float and value.is_integer())


class _Classes(NamedTuple):
    """The keys of the classes, their names where they are known, and the label of each entry."""

    keys: tuple[str, ...]
    names: tuple[str, ...] | None
    labels: list[int]


def _classes(found: Sequence[_Entry], folder: Path, pattern: Path) -> _Classes:
    """Return the classes of all entries. Raises UserError where only some of the entries have a label."""
    places = [above / file for above in (folder, folder.parent) for file in NAME_FILES]
    listed = next((path for path in places if is_file(path)), None)
    names = tuple(lines_of(listed, "list of class names")) if listed is not None else ()
    numbers = [entry.number for entry in found if entry.number is not None]
    texts = [entry.name for entry in found if entry.name is not None]
    if len(numbers) == len(found):
        if names and max(numbers) >= len(names):
            raise UserError(
                f"{listed} lists {len(names)} classes, but webdataset {pattern} has the label {max(numbers)}"
            )
        pairs = sorted({(entry.number, entry.name) for entry in found if entry.name is not None})
        captions = any(entry.caption for entry in found) and len(pairs) > max(1, len(found) // 2)
        counted = [number for number, _ in pairs] == list(range(len(pairs)))
        if not names and len(texts) == len(found) and counted and not captions:
            names = tuple(name for _, name in pairs)
        if not names:
            if min(numbers) > 0:
                notices.warn(
                    f"webdataset {pattern}: labels begin at {min(numbers)}, not at 0; the classes below it have no "
                    "picture"
                )
            return _Classes(tuple(map(str, range(max(numbers) + 1))), None, numbers)
        return _Classes(unique_keys(names), _shown(names), numbers)
    if not numbers and len(texts) == len(found):
        # Captions of pictures lie in files .txt, too. They are no classes.
        if not set(texts) <= set(names):
            if any(entry.caption for entry in found) and len(set(texts)) > max(1, len(texts) // 2):
                notices.warn(f"webdataset {pattern}: the texts beside the pictures are taken for captions, not classes")
                return _Classes((), None, [-1] * len(found))
            names = tuple(sorted(set(texts)))
            if folder != pattern and is_folder(pattern):
                notices.warn(
                    f"webdataset {pattern}: its classes are only the names that occur in {folder}; where "
                    f"another part has more, list all of them in {pattern / NAME_FILES[0]}"
                )
        label_of = {name: label for label, name in enumerate(names)}
        return _Classes(unique_keys(names), _shown(names), [label_of[text] for text in texts])
    if not numbers and not texts:
        return _Classes((), None, [-1] * len(found))
    without = [entry.pictures[0].name for entry in found if entry.number is None]
    raise UserError(
        f"webdataset {pattern}: {len(without)} of {len(found)} pictures have no label: {', '.join(without[:EXAMPLES])}"
    )


def _shown(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(name.replace("_", " ").split()) for name in names)
