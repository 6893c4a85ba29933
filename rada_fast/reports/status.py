"""The state of a run, read from its folder while the run goes on or later, without a change to the folder.

Lines are read as they are appended. A line counts only when its end has been written, so half a line is never believed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rada_fast.reports.answers import answers_of
from rada_fast.runs import heartbeat
from rada_fast.runs.contents import IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE, SUPERSEDED
from rada_fast.runs.lock import Owner, is_held, owner_of
from rada_fast.runs.origin import read_identity
from rada_fast.runs.progress import Counts

STALE = 120.0
"""A run whose lock cannot be looked at counts as interrupted when its progress has not changed for so many seconds."""
MOST_SUMMARY_BYTES = 2**28
"""A larger summary is not read."""
READ_AT_ONCE = 2**24
"""So many bytes of a file of lines are read at once."""
LINES = ("images*.jsonl", "predictions*.jsonl")
"""The files of lines about images; a run of several processes has one for each."""
RUNNING, FINISHED, INTERRUPTED, DAMAGED = "running", "finished", "interrupted", "damaged"


class LineFile:
    """The lines that have been appended to a file since the last look at it."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._file = path, 0, 0

    def restarted(self) -> bool:
        """Return whether the file has been replaced or cut since the last look, so that all its lines count anew."""
        try:
            state = self._path.stat()
        except OSError:
            state = None
        number, size = (0, 0) if state is None else (state.st_ino, state.st_size)
        changed = self._offset > 0 and (number != self._file or size < self._offset)
        if changed:
            self._offset = 0
        self._file = number
        return changed

    def new(self) -> tuple[list[dict[str, Any]], int]:
        """Return the records of the new whole lines, and how many of these lines are damaged."""
        records, damaged = [], 0
        try:
            if not self._path.is_file():
                return [], 0
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while True:
                    content = file.read(READ_AT_ONCE)
                    whole = content[: content.rfind(b"\n") + 1]
                    if not whole:
                        break
                    self._offset += len(whole)
                    file.seek(self._offset)
                    for line in whole.splitlines():
                        record = _object(line)
                        damaged += record is None
                        if record is not None:
                            records.append(record)
        except OSError:  # it has gone since
            pass
        return records, damaged


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@dataclass
class _Images:
    """The images that lines tell of, by the set of images that they belong to."""

    ids: set[str] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)
    diverged: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count an image, unless it was counted before."""
        id = str(record.get("id"))
        if id in self.ids:
            return
        self.ids.add(id)
        try:
            answers = answers_of(record) if "zero_shot" in record or record.get("status") == "unreadable" else None
        except (TypeError, AttributeError):
            answers = None
        right = dict(self.counts.right)
        if answers is not None:
            right = {name: right.get(name, 0) + is_right for name, is_right in answers.items()}
        self.diverged += record.get("status") == "diverged"
        self.counts = Counts(
            self.counts.done + 1, None, self.counts.labelled + (answers is not None), right,
            self.counts.unreadable + (record.get("status") == "unreadable"),
        )  # fmt: skip


@dataclass(frozen=True)
class Status:
    """What a folder says about its run.

    folder: the folder.
    state: running, finished, interrupted or damaged.
    command: the command of the run, such as ttt.
    owners: the processes that run in it, or ran in it last.
    ranks: the number of processes whose lines it holds.
    title, note: what the run does at present, or did last, and a few words about it, such as the loss.
    done, total, unit: how much of that is done, and of how much.
    per_second, recent_per_second, seconds_left: the rate over the whole of it and over the last minutes, and the time
        that is left.
    images, images_in_all: how many images have a line, and how many will have one.
    accuracy: the top-1 accuracies so far in percent, by the set of images and the answer.
    unreadable, diverged, damaged_lines: how many images could not be read or adapted to, and lines are damaged.
    epochs, epochs_in_all, loss, train_top1: the finished epochs, and the record of the last one.
    memory: the memory of all processes.
    bytes: the size of the folder.
    warnings: the last warnings of the run.
    resume: the command that goes on, for a run that was interrupted.
    updated: when the run has last written its progress, in seconds since 1970.
    fault: what is wrong with the folder, or None.
    """

    folder: str
    state: str
    command: str | None = None
    owners: tuple[Owner, ...] = ()
    ranks: int = 1
    title: str | None = None
    note: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = "images"
    per_second: float | None = None
    recent_per_second: float | None = None
    seconds_left: float | None = None
    images: int = 0
    images_in_all: int | None = None
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unreadable: int = 0
    diverged: int = 0
    damaged_lines: int = 0
    epochs: int | None = None
    epochs_in_all: int | None = None
    loss: float | None = None
    train_top1: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    warnings: tuple[str, ...] = ()
    resume: str | None = None
    updated: float | None = None
    fault: str | None = None


class Watched:
    """A folder of a run that is looked at again and again. Each look reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, LineFile] = {}
        self._known: tuple[Any, ...] = (None, None, None)
        self._forget()

    def _forget(self) -> None:
        self._sets: dict[str, _Images] = {}
        self._epochs: dict[tuple[str, int], dict[str, Any]] = {}
        self._damaged = 0
        self._files = {path: LineFile(path) for path in self._files}

    def look(self) -> Status:
        """Return the present state of the run."""
        folder = self.folder
        identity, stored_images = self._identity()
        self._read_lines()
        locks = sorted(folder.glob(LOCK_FILE.replace(".", "*.")))
        beats = heartbeat.read(folder)
        summary = _summary(folder)
        state = self._state(locks, beats, summary)
        fault = None
        if identity is None:
            state = DAMAGED if state != RUNNING else state
            fault = f"its {IDENTITY_FILE} is damaged or missing" if state == DAMAGED else None
        command = (identity or {}).get("command")
        last = list(self._epochs.values())[-1:] or [{}]
        sets = self._sets.values()
        beats = beats if state in (RUNNING, INTERRUPTED) else []
        progress = _progress(beats)
        images = sum(one.counts.done for one in sets)
        warnings = [warning for beat in beats for warning in _texts(beat.get("warnings"))]
        if summary is not None and state == FINISHED:
            progress["per_second"] = _number(_dict(summary.get("time")).get("images_per_second"))
            warnings = _texts(summary.get("warnings"))[-heartbeat.KEPT_WARNINGS :]
        images_in_all = None
        if command in ("ttt", "predict", "features"):
            images_in_all = images if state == FINISHED else _of_beats(beats) or stored_images
        return Status(
            str(folder),
            state,
            command,
            owners=tuple(owner for lock in locks if (owner := owner_of(lock)) is not None),
            ranks=max(1, len(beats), len(locks), sum(path.match("images*.jsonl") for path in self._files)),
            images=images,
            images_in_all=None if images_in_all is None else max(images, images_in_all),
            accuracy={name: own.counts.accuracies() for name, own in self._sets.items() if own.counts.labelled},
            unreadable=sum(one.counts.unreadable for one in sets),
            diverged=sum(one.diverged for one in sets),
            damaged_lines=self._damaged,
            epochs=len(self._epochs) if command in ("eft", "fft") else None,
            epochs_in_all=_epochs_in_all(identity or {}),
            loss=_number(last[0].get("loss")),
            train_top1=_number(last[0].get("train_top1")),
            memory=_sums([beat.get("memory") for beat in beats]),
            bytes=_size_of(folder),
            warnings=tuple(dict.fromkeys(warnings)),
            resume=next((_resume(beat) for beat in beats if beat.get("command")), None)
            if state == INTERRUPTED
            else None,
            updated=max((_number(beat.get("updated")) or 0.0 for beat in beats), default=None),
            fault=fault,
            **progress,
        )

    def _identity(self) -> tuple[dict[str, Any] | None, int | None]:
        """Return the identity of the run, and the number of its images, from a file that is read when it is new."""
        path = self.folder / IDENTITY_FILE
        try:
            state = path.stat()
        except OSError:
            return None, None
        stamp = (state.st_ino, state.st_mtime_ns, state.st_size)
        if self._known[0] != stamp:
            identity = read_identity(self.folder)
            self._known = (stamp, identity, None if identity is None else _images_in_all(path))
        return self._known[1], self._known[2]

    def _read_lines(self) -> None:
        paths = [path for pattern in (*LINES, "epochs.jsonl") for path in sorted(self.folder.glob(pattern))]
        for path in paths:
            if path.name != SUPERSEDED:
                self._files.setdefault(path, LineFile(path))
        if sum(file.restarted() for file in self._files.values()):  # every file is asked
            self._forget()
        for path, file in self._files.items():
            records, damaged = file.new()
            self._damaged += damaged
            for record in records:
                if path.name == "epochs.jsonl":
                    if isinstance(record.get("epoch"), int):
                        self._epochs[str(record.get("stage", "")), record["epoch"]] = record
                elif "id" in record:
                    self._sets.setdefault(_set_of(record), _Images()).add(record)

    def _state(self, locks: list[Path], beats: list[dict[str, Any]], summary: dict[str, Any] | None) -> str:
        held = [is_held(lock) for lock in locks]
        updated = max((_number(beat.get("updated")) or 0.0 for beat in beats), default=0.0)
        if any(held) or (None in held and time.time() - updated < STALE):
            return RUNNING
        try:
            written = (self.folder / SUMMARY_FILE).stat().st_mtime if summary is not None else 0.0
        except OSError:
            written = 0.0
        return FINISHED if written and written >= updated else INTERRUPTED


def _set_of(record: Mapping[str, Any]) -> str:
    """Return the name of the set of images that a line belongs to, or "" where the run has a single one."""
    if record.get("train") or record.get("split") == "train":
        return "train"
    names = [record.get(name) for name in ("stage", "test", "split", "data")]
    return " ".join(str(name) for name in names if name is not None)


def _progress(beats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the progress of a run, of all its processes together."""
    if not beats:
        return {}
    # Processes that do not share the present work, such as those that wait for the first one, have no part in it.
    newest = max(beats, key=lambda beat: _number(beat.get("updated")) or 0.0)
    same = [beat for beat in beats if str(beat.get("title")) == str(newest.get("title"))]
    total = [_number(beat.get("total")) for beat in same]
    left = [_number(beat.get("seconds_left")) for beat in same]
    sums = _sums([{name: beat.get(name) for name in ("done", "per_second", "recent_per_second")} for beat in same])
    return {
        "title": str(newest.get("title")),
        "unit": str(newest.get("unit", "steps")),
        "note": str(newest.get("note") or ""),
        "done": int(sums.get("done", 0)),
        "total": None if None in total else int(sum(one for one in total if one is not None)),
        "per_second": sums.get("per_second"),
        "recent_per_second": sums.get("recent_per_second"),
        "seconds_left": None if None in left else max(one for one in left if one is not None),
    }


def _resume(beat: Mapping[str, Any]) -> str:
    """Return the command that goes on. Its paths may be relative to the folder in which the run was started."""
    command, directory = str(beat["command"]), beat.get("directory")
    if not isinstance(directory, str) or Path(directory) == Path.cwd():
        return command
    return f"cd {shlex.quote(directory)} && {command}"


def _sums(values: list[Any]) -> dict[str, float]:
    """Return the sums of numbers with equal names. What is no number is left out."""
    sums: dict[str, float] = {}
    for entry in values:
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if (number := _number(value)) is not None:
                sums[name] = round(sums.get(name, 0.0) + number, 4)
    return sums


def _number(value: Any) -> float | None:
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else []


def _summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run, or None if there is none that can be read."""
    path = folder / SUMMARY_FILE
    try:
        if not path.is_file() or path.stat().st_size > MOST_SUMMARY_BYTES:
            return None
        return _object(path.read_bytes())
    except OSError:
        return None


def _images_in_all(path: Path) -> int | None:
    """Return the number of images of a run, where its run.json lists them. It does not know of a --limit."""
    try:
        parts = (_object(path.read_bytes()) or {}).get("inputs")
    except OSError:
        return None
    part = parts.get("data") if isinstance(parts, dict) else None
    # A feature file has hashes of its arrays instead of a list of images.
    return len(part) if isinstance(part, dict) and "features" not in part else None


def _of_beats(beats: list[dict[str, Any]]) -> int | None:
    """Return the number of images of a run as its processes state it: what an earlier run had done, and their own."""
    earlier = [_number(beat.get("earlier")) for beat in beats]
    total = [_number(beat.get("total")) for beat in beats]
    if not beats or None in earlier or None in total:
        return None
    return int(max(one or 0 for one in earlier) + sum(one or 0 for one in total))


def _epochs_in_all(identity: Mapping[str, Any]) -> int | None:
    """Return the number of epochs that a training was started for."""
    options = identity.get("options", {})
    if identity.get("command") == "eft":
        return int(number) if (number := _number(options.get("epochs"))) is not None else None
    if identity.get("command") != "fft":
        return None
    # Only a method with two stages uses the second number, and the lines of its second stage have another name.
    from rada_fast.config.methods import FFT_METHODS

    method = next((method for name, method in FFT_METHODS.items() if name == options.get("method")), None)
    stages = 1 if method is None or options.get("stages") == "first" else len(method.stages)
    epochs = [_number(options.get(name)) for name in ("epochs", "finetune_epochs")[:stages]]
    return None if None in epochs else int(sum(one for one in epochs if one is not None))


def _size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += (Path(root) / name).lstat().st_size
            except OSError:  # it was renamed or removed since
                continue
    return size
