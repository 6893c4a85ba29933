"""The inspection of data: what is found, how it differs from what is published, and how to mend it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.few_shot import STORED_CHOICES, PublishedShots
from rada_fast.data.folders import EXAMPLES
from rada_fast.data.open import open_source
from rada_fast.data.parts import PARTS, Part, split_part
from rada_fast.data.published import COOP_SETS
from rada_fast.data.readers.imagenet import IMAGENET_KINDS, TRAINING_COUNT
from rada_fast.data.readers.objectnet import CLASSES as OBJECTNET_CLASSES
from rada_fast.data.sources import FeatureFile, ImageFolder, Source
from rada_fast.errors import UserError
from rada_fast.system import notices

SAMPLED = 200
"""As many pictures of each part are decoded unless all are."""
WITH_PARTS: dict[str, tuple[Part, ...]] = {
    "coop": PARTS, "imagenet": ("train", "val"), "csv": PARTS, "webdataset": PARTS, "hf": PARTS,
}  # fmt: skip
"""The kinds whose data may have parts, and these parts."""
_ABSENT = re.compile(r"has no (part|folder|picture) (of|for) |^ImageNet: no folder was found")
"""The messages that say that data lack a part."""
_CHOICE = re.compile(r"shot_(\d{1,6})-seed_(\d{1,9})\.pkl")


@dataclass
class PartReport:
    """What was found in a part of some data.

    part: its name, or "all" where the data have no parts.
    where: the data, in the words of a message.
    images, classes: their numbers.
    each: the smallest and the largest number of images of a class that has images.
    names: the names of the first classes.
    decoded: the number of pictures that were decoded for the inspection.
    faults: what is wrong, each with how to mend it.
    warnings: what may be wrong.
    """

    part: str
    where: str = ""
    images: int = 0
    classes: int = 0
    each: tuple[int, int] | None = None
    names: tuple[str, ...] = ()
    decoded: int = 0
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def inspect(
    spec: str, *, all_files: bool, names_of: Callable[[Source], Sequence[str]], advance: Callable[[], None]
) -> list[PartReport]:
    """Inspect every part of some data.

    spec: the data as KIND:PATH or KIND:PATH@PART.
    all_files: whether to decode every picture instead of some.
    names_of: a function that returns the names of the classes for prompts, and may raise UserError.
    advance: a function that is called after each decoded picture.
    """
    kind, _, path = spec.partition(":")
    named = split_part(path)[1]
    parts = (named,) if named is not None else WITH_PARTS.get(kind, ("test",))
    reports: list[PartReport] = []
    sources: dict[str, Source] = {}
    for part in parts:
        report = PartReport(part if kind in WITH_PARTS else "all")
        with notices.collecting(hold=True):
            try:
                source = open_source(spec, part)
            except UserError as error:
                notices.discard()
                report.faults.append(str(error))
            else:
                sources[report.part] = source
                _describe(report, source, names_of)
                _compare(report, source, kind, part)
                _decode(report, source, all_files, advance)
                report.warnings += [message for message in notices.so_far() if message not in report.faults]
                notices.discard()
        reports.append(report)
    return _joined(reports, sources)


def _describe(report: PartReport, source: Source, names_of: Callable[[Source], Sequence[str]]) -> None:
    report.where = source.description
    report.images, report.classes = len(source.ids), source.num_classes if source.has_classes else 0
    if not source.has_classes:
        return
    counts = Counter(source.labels.tolist())
    report.each = (min(counts.values()), max(counts.values()))
    try:
        report.names = tuple(names_of(source))
    except UserError as error:
        report.faults.append(str(error))


def _compare(report: PartReport, source: Source, kind: str, part: Part) -> None:
    """Compare the numbers of classes and images with those that are published."""
    if isinstance(source, FeatureFile):
        return
    published = _published(source, kind, part)
    if published is None:
        return
    title, classes, total, each = published
    if report.classes != classes:
        report.faults.append(f"{title} has {classes} classes, this has {report.classes}: another list, or one changed")
    counts = Counter(source.labels.tolist())
    if empty := [source.folders[label] for label in range(source.num_classes) if not counts[label]]:
        report.faults.append(
            f"{len(empty)} of {source.num_classes} classes have no image ({_some(empty)}): copy or extract them again"
        )
    if each is not None and (wrong := [label for label in sorted(counts) if counts[label] != each]):
        shown = [f"{source.folders[label]} has {counts[label]}" for label in wrong]
        report.faults.append(
            f"{title} has {each} images of each class, {len(wrong)} classes differ ({_some(shown)}): copy or extract "
            "them again"
        )
    elif total is not None and report.images != total:
        report.faults.append(
            f"{title} has {total} images, this has {report.images}: "
            + ("something is missing, extract the archive again" if report.images < total else "something was added")
        )


def _published(source: ImageFolder, kind: str, part: Part) -> tuple[str, int, int | None, int | None] | None:
    """Return the title, the number of classes, that of images, and that of each class's images, where published."""
    for known in COOP_SETS:
        if source.what == f"{known.name} in":
            return f"{known.name}'s {part} part", known.classes, known.counts[PARTS.index(part)], None
    for variant in IMAGENET_KINDS:
        if source.what == f"{variant.title} in":
            if variant.kind == "imagenet" and part == "train":
                return "ImageNet's train part", 1000, TRAINING_COUNT, None
            return variant.title, 1000 if variant.synsets == "imagenet" else 200, variant.total, variant.each
    if kind == "objectnet":
        return "ObjectNet among ImageNet's classes", OBJECTNET_CLASSES, None, None
    return None


def _decode(report: PartReport, source: Source, all_files: bool, advance: Callable[[], None]) -> None:
    """Decode pictures, and report those that cannot be read."""
    samples = source.samples if all_files else source.limited(SAMPLED).samples
    unreadable: list[str] = []
    for sample in samples:
        try:
            read_image(sample.path)
        except UnreadableImageError as error:
            unreadable.append(f"{sample.id}: {error}")
        advance()
    report.decoded = len(samples)
    if unreadable:
        report.faults.append(
            f"{len(unreadable)} of {len(samples)} pictures tried cannot be read ({_some(unreadable)}): replace them, "
            "or give --allow-unreadable to runs"
        )


def _joined(reports: list[PartReport], sources: dict[str, Source]) -> list[PartReport]:
    """Join the reports of parts: drop what all say, and compare the parts with one another."""
    opened = [report for report in reports if report.part in sources]
    if not opened:
        # The parts of data that cannot be opened at all have one reason.
        return [PartReport("all", faults=reports[-1].faults)]
    whole = [source for source in sources.values() if isinstance(source, ImageFolder)]
    first = sources[opened[0].part]
    if len(whole) > 1 and all(source.stamps() == whole[0].stamps() for source in whole):
        opened[0].part = "all"
        return opened[:1]
    for report in reports:
        if report not in opened and all(_ABSENT.search(fault) for fault in report.faults):
            # Data need not have every part.
            report.warnings, report.faults = [f"there is no {report.part} part"], []
    for report in opened[1:]:
        source = sources[report.part]
        if isinstance(source, ImageFolder) and isinstance(first, ImageFolder):
            own = {str(sample.path) for sample in source.samples}
            both = sorted(own & {str(sample.path) for sample in first.samples})
            if both and own != {str(sample.path) for sample in first.samples}:
                report.faults.append(f"{len(both)} images are also in {opened[0].part} ({_some(both)}): mend the list")
    for report in opened:
        source = sources[report.part]
        if isinstance(source, ImageFolder) and source.published_shots is not None:
            _check_choices(report, source.published_shots)
    return reports


def _check_choices(report: PartReport, rule: PublishedShots) -> None:
    """Check that CoOp's stored choices can be read, and say where a seed would draw other images."""
    folder = rule.folder / STORED_CHOICES
    for path in sorted(folder.glob("shot_*-seed_*.pkl")) if folder.is_dir() else []:
        found = _CHOICE.fullmatch(path.name)
        if found is None:
            continue
        try:
            listed = rule.listed_in(path)
            drawn = rule.drawn(int(found[1]), int(found[2]))
        except UserError as error:
            report.faults.append(str(error))
            continue
        if listed != drawn:
            report.warnings.append(
                f"{path} lists other images than CoOp's draw with seed {found[2]}; runs take those that it lists"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
