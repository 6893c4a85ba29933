"""The results of finished runs, read from their folders: the answers of every run on every set of images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rada_fast.errors import UserError
from rada_fast.reports.summary import is_image_record
from rada_fast.runs.contents import IDENTITY_FILE, SUMMARY_FILE
from rada_fast.runs.origin import method_of, method_options, read_identity
from rada_fast.system import notices

IMAGES = "images.jsonl"
MEASURING = ("ttt", "eft", "fft", "eval")
"""The commands that compare answers with the classes of images."""


class Answer(NamedTuple):
    """The answers of one run about one labelled image.

    id: the name of the image.
    label: the number of its class.
    before, after: the classes that were predicted, the best first, before and after adaptation; empty for an image that
        could not be read, which counts as wrong.
    confidence: the probability of the first of these classes, before and after.
    """

    id: str
    label: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    confidence: tuple[float, float] | None

    @property
    def right_before(self) -> bool:
        """Return whether the first class before adaptation is the right one."""
        return self.before[:1] == (self.label,)

    @property
    def right_after(self) -> bool:
        """Return whether the first class after adaptation is the right one."""
        return self.after[:1] == (self.label,)


@dataclass(frozen=True)
class Evaluation:
    """The answers of one run on one set of images.

    folder: the folder of the run.
    command: the command of the run.
    method: what runs have in common that differ in seed and data alone; see method_of.
    options: the options of the run, without those of seed and data.
    seed: the seed of the run, or of the run that trained its adapter.
    trained_on: the data that the run, or the run that made its adapter, was trained on, or None.
    data: the set of images as KIND:PATH.
    part: "base" or "new" for the halves of the classes, "rada" or "rada-ft" for the stages of fft, and otherwise "all".
    answers: the answers about all labelled images.
    class_names: the names of the classes that occur, by number.
    unlabelled: the number of images without a class, which no measure contains.
    """

    folder: Path
    command: str
    method: str
    options: dict[str, Any]
    seed: int
    trained_on: str | None
    data: str
    part: str
    answers: tuple[Answer, ...]
    class_names: dict[int, str]
    unlabelled: int = 0

    @cached_property
    def by_id(self) -> dict[str, Answer]:
        """The answers by the names of their images."""
        return {answer.id: answer for answer in self.answers}


def read_results(folders: Sequence[str]) -> list[Evaluation]:
    """Read the results of runs.

    folders: the folders of runs, or folders that contain those of runs at any depth. Runs of commands that measure no
        accuracy are left out, and with a warning those that have not finished.

    Raises UserError if a folder contains no run, or if no run has finished.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = list(runs_below(Path(folder).expanduser()))
        if not runs:
            raise UserError(_no_run(Path(folder).expanduser()))
        found |= dict.fromkeys(path.resolve() for path in runs)
    others = [path for path in found if (read_identity(path) or {}).get("command") not in MEASURING]
    if len(others) == len(found):
        raise UserError(f"runs must be of {', '.join(MEASURING)}; {_listed(others)} measured no accuracy")
    found = {path: None for path in found if path not in others}
    unfinished = [path for path in found if not (path / SUMMARY_FILE).is_file()]
    if len(unfinished) == len(found):
        raise UserError(f"runs must be finished, and none of these is: {_listed(unfinished)}; start them again")
    if unfinished:
        notices.warn(f"{len(unfinished)} of {len(found)} runs are not finished and left out: {_listed(unfinished)}")
    evaluations = []
    for path in found:
        read = read_run(path) if path not in unfinished else []
        if (difference := _difference_from_summary(path, read)) is not None:
            notices.warn(f"run {path} is left out: {difference}; start it again, without --limit")
        else:
            evaluations += read
    if not evaluations:
        raise UserError(f"runs must have labelled images to be reported, those of {_listed(list(found))} have none")
    return evaluations


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield the folder itself if it is that of a run, and otherwise all folders of runs below it."""
    if not folder.is_dir():
        return
    for path, names, files in os.walk(folder):
        names.sort()
        if IDENTITY_FILE in files and read_identity(Path(path)) is not None:
            names.clear()
            yield Path(path)


def _difference_from_summary(folder: Path, evaluations: Sequence[Evaluation]) -> str | None:
    """Say how the lines of a run differ from its summary, or return None.

    They differ while a finished run goes on with more images, and where it was started again with a smaller --limit.
    """
    summary = _json(folder / SUMMARY_FILE) if evaluations else {}
    for one in evaluations:
        stated = _entry_of(summary, one).get("images")
        lines = len(one.answers) + one.unlabelled
        if stated is not None and stated != lines:
            return f"its {IMAGES} has {lines} images of {one.data} ({one.part}), its {SUMMARY_FILE} counts {stated}"
    return None


def _entry_of(summary: dict[str, Any], one: Evaluation) -> dict[str, Any]:
    """Return the entry of a summary about one set of images."""
    match one.command:
        case "ttt":
            return summary
        case "fft":
            entry = summary.get(one.part, {}).get(one.data)
        case "eft" if one.part in ("base", "new"):
            entry = summary.get(one.part)
        case "eft" if one.data == summary["config"].get("test"):
            entry = summary.get("test")
        case _:
            entry = summary.get(one.data)
    return entry if isinstance(entry, dict) else {}


def read_run(folder: Path) -> list[Evaluation]:
    """Read the results of one finished run. Raises UserError naming the file that cannot be read."""
    try:
        return _read_run(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"runs {folder}: its files are damaged, or were changed ({reason})") from None


def _read_run(folder: Path) -> list[Evaluation]:
    identity = read_identity(folder)
    summary = _json(folder / SUMMARY_FILE)
    if identity is None or not isinstance(summary, dict):
        raise UserError(f"runs {folder}: {IDENTITY_FILE} or {SUMMARY_FILE} is damaged")
    origin = summary.get("origin")
    options = summary.get("config", {})
    own = options.get("run", {}).get("seed", 0)
    common: dict[str, Any] = {
        "folder": folder,
        "command": identity["command"],
        "method": method_of(identity, origin),
        "options": method_options(identity),
        # An adapter from a run repeats that run's experiment, so the seed is that of its training.
        "seed": origin["seed"] if origin and identity["command"] != "eft" else own,
        "trained_on": options.get("train") or (origin or {}).get("data"),
    }
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in _lines(folder / IMAGES):
        place = _place(line, identity["command"], options)
        if place is not None and is_image_record(line, line.get("label")):
            groups.setdefault(place, []).append(line)
    found = [evaluation_of(lines, data=data, part=part, **common) for (data, part), lines in groups.items()]
    for one in found:
        if not one.answers:
            notices.warn(f"{folder}: the {one.unlabelled} images of {one.data} have no classes and are left out")
    return [one for one in found if one.answers]


def _place(line: dict[str, Any], command: str, options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the data and the part that a line of images.jsonl belongs to, or None for a training image."""
    if line.get("train") or line.get("split") == "train":
        return None
    if "split" in line:
        split = str(line["split"])
        if split in ("base", "new"):
            return str(
                options.get("new_test") if split == "new" and options.get("new_test") else options["test"]
            ), split
        return (str(options["test"]) if split == "test" else split), "all"
    if "test" in line:
        return str(line["test"]), str(line.get("stage", "all"))
    return str(line.get("data", options.get("data", command))), "all"


def evaluation_of(lines: Sequence[dict[str, Any]], **common: Any) -> Evaluation:
    """Make an evaluation of the records of its images. common: the entries of Evaluation that come from its run."""
    answers, names = [], {}
    for line in lines:
        if line["label"] is None:
            continue
        if type(line["label"]) is not int:
            raise TypeError(f"the label {line['label']!r} is no number")
        before, after = (tuple(line.get(name) or ()) for name in ("zero_shot", "adapted"))
        sure = line.get("confidence")
        confidence = (float(sure[0]), float(sure[1])) if sure else None
        answers.append(Answer(line["id"], line["label"], before, after, confidence))
        if line.get("label_name") is not None:
            names[line["label"]] = line["label_name"]
        for kind in ("zero_shot", "adapted"):
            names |= dict(zip(line.get(kind) or (), line.get(f"{kind}_names") or (), strict=False))
    return Evaluation(**common, answers=tuple(answers), class_names=names, unlabelled=len(lines) - len(answers))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"runs {path} cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"runs {path} cannot be read: {error}") from None


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"runs {folder} does not exist"
    if not folder.is_dir():
        return f"runs {folder} must be the folder of a run, it is a file"
    entries = sorted(path.name for path in folder.iterdir())
    holds = f"it holds {', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''}" if entries else "it is empty"
    return (
        f"runs {folder} is not the folder of a run of ttt, eft, fft or eval, and holds none ({IDENTITY_FILE}); {holds}"
    )


def _listed(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return ", ".join(map(str, folders[:3])) + more
