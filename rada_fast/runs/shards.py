"""Who writes what in the folder of a run of several processes (ranks), and how their lines become one file.

The first rank opens, checks and locks the folder as a process alone does, and writes everything that is written once.
Each rank, also the first, appends its lines to a file of its own: images.rank-0003.jsonl is that of rank 3, and has the
form of images.jsonl. Each other rank also holds a lock, run.rank-0003.lock, and writes its progress into
progress.rank-0003.json.

Whenever a run is started, with any number of ranks or without torchrun, and again at its end, the first rank moves the
lines of all such files into images.jsonl. So it does not matter which ranks have written them, or how many there were.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rada_fast.config.options import RunOptions
from rada_fast.runs import heartbeat, lines
from rada_fast.runs.contents import LOCK_FILE, OF_RANK, name_of_rank, names_in
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.runs.heartbeat import HEARTBEAT_FILE
from rada_fast.runs.lock import FolderLock, is_held
from rada_fast.runs.progress import Counts
from rada_fast.system import files
from rada_fast.system.ranks import Ranks

SHARE_INTERVAL = 1.0
"""The shortest time between two reports of a rank's progress to the others, in seconds."""


def open_run_folder(
    group: Ranks,
    options: RunOptions,
    identity: Mapping[str, Any],
    inputs: Inputs | None = None,
    data: Sequence[Path] = (),
    option_paths: Sequence[Path] = (),
) -> RunFolder:
    """Open the folder of a run in one or several processes, and merge what earlier ranks have left there.

    group: the processes; the other arguments are those of RunFolder.

    Raises UserError in the first rank as RunFolder does, or if a rank of another run still runs in the folder.
    """
    if not group.first:
        return FollowingFolder(group, options, identity, inputs)
    path = Path(options.output).expanduser()
    locks = [path / name for name in (names_in(path) if path.is_dir() else []) if _is_of_rank(name, LOCK_FILE)]
    for lock in locks:
        if is_held(lock):
            FolderLock(lock).release()  # this raises the error that names the process
    folder = (LeadingFolder if group.several else RunFolder)(options, identity, inputs, data, option_paths)
    try:
        for lock in locks:
            _remove_lock(lock)
        for name in names_in(folder.path):
            if _is_of_rank(name, HEARTBEAT_FILE):
                files.remove(folder.path / name)
        merge(folder.path)
    except BaseException:
        folder.close()
        raise
    if isinstance(folder, LeadingFolder):
        folder.admit(group)
    return folder


class LeadingFolder(RunFolder):
    """The folder of a run as the first of several ranks sees it."""

    _group = Ranks()

    def admit(self, group: Ranks) -> None:
        """Let the other ranks into the folder, which is opened and checked."""
        self._group = group
        group.broadcast(self.resumed)

    def finished_summary(self, scope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the summary if this run has already finished, on every rank. All ranks must call this."""
        found: dict[str, Any] | None = self._group.broadcast(super().finished_summary(scope))
        return found

    def load_state(self, name: str, use: Callable[[dict[str, Any]], None]) -> bool:
        """Read the newest usable state of a name, the same one on every rank. All ranks must call this."""
        return bool(self._group.broadcast(super().load_state(name, use)))


class FollowingFolder(RunFolder):
    """The folder of a run as the ranks other than the first see it: they write nothing but lines of their own.

    group: the processes, of which the first opens the folder and checks it; the other arguments are those of RunFolder.
    """

    def __init__(
        self, group: Ranks, options: RunOptions, identity: Mapping[str, Any], inputs: Inputs | None = None
    ) -> None:
        self._begin(options, identity, inputs, ())
        self.stored_inputs: Mapping[str, Mapping[str, str]] = {}
        self._group = group
        self.resumed = group.broadcast(None)
        self._lock_path = self.path / name_of_rank(LOCK_FILE, group.rank)
        self._lock = FolderLock(self._lock_path)
        self._heartbeat = heartbeat.begin(self.path, name_of_rank(HEARTBEAT_FILE, group.rank))

    def close(self) -> None:
        """Release the lock of this rank."""
        heartbeat.end(self._heartbeat)
        self._lock_path.unlink(missing_ok=True)
        self._lock.release()

    def finished_summary(self, scope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the summary that the first rank has found; see LeadingFolder."""
        found: dict[str, Any] | None = self._group.broadcast(None)
        return found

    def load_state(self, name: str, use: Callable[[dict[str, Any]], None]) -> bool:
        """Read the state that the first rank has read; see LeadingFolder."""
        return bool(self._group.broadcast(None)) and super().load_state(name, use)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to a file of this rank, and nothing to a file of the run."""
        if _is_of_rank(name):
            super().append(name, record)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Leave the summary to the first rank, and remove the file of this rank's progress."""
        self._heartbeat.remove()

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return nothing. The first rank alone reads lines, because reading mends a file that was cut off."""
        return []

    def result_files(self) -> dict[str, int | None]:
        """Return nothing, because the first rank may still write."""
        return {}

    def _leave_to_the_first(self, *_: object, **__: object) -> None:
        """Write nothing: the first rank does."""

    log = accept_inputs = append_all = write_lines = supersede = write_table = append_bytes = _leave_to_the_first
    truncate = remove = save_adapter = save_tensors = save_state = _leave_to_the_first


def own_file(name: str, group: Ranks) -> str:
    """Return the name of the file to which a rank appends its lines; a process alone appends to the file itself."""
    return name_of_rank(name, group.rank) if group.several else name


def merge(folder: Path) -> None:
    """Move the lines of all ranks' files in a folder into the file that a process alone writes.

    A line that was cut off when its rank was killed is dropped, as lines.read does. If this is interrupted, the next
    call completes it: a line that has been moved already is not added again.
    """
    parts: dict[str, list[Path]] = {}
    for name in names_in(folder):
        if _is_of_rank(name) and name.endswith(".jsonl"):
            parts.setdefault(_without_rank(name), []).append(folder / name)
    for name, paths in parts.items():
        records: dict[str, dict[str, Any]] = {}
        for path in (folder / name, *paths):
            for record in lines.read(path):
                records.setdefault(json.dumps(record, sort_keys=True), record)
        lines.write(folder / name, records.values())
        for path in paths:
            files.remove(path)


class SharedCounts:
    """The sum of what all ranks have finished of some work, for progress(). All ranks must make one for each work.

    group: the processes that share the work.
    """

    def __init__(self, group: Ranks) -> None:
        self._group, self._name = group, f"progress {next(_works)}"
        self._last = -SHARE_INTERVAL
        self._sum = Counts()

    def __call__(self, own: Counts) -> Counts:
        """Return the counts of all ranks, at most SHARE_INTERVAL seconds old. own: the counts of this rank."""
        now, ended = time.monotonic(), own.done == own.total
        if now - self._last >= SHARE_INTERVAL or ended:
            self._last = now
            self._group.tell(self._name, dataclasses.asdict(own))
            if self._group.first:
                told = [Counts(**counts) for counts in self._group.told(self._name)]
                self._sum = sum(told[1:], told[0]) if told else own
        return self._sum if self._group.first else own


_works = itertools.count()
"""The numbers of the works of which ranks share the counts, the same on all ranks."""


def shared_counts(group: Ranks) -> SharedCounts | None:
    """Return what adds the progress of all ranks, or None for a process alone."""
    return SharedCounts(group) if group.several else None


def _without_rank(name: str) -> str:
    match = OF_RANK.fullmatch(name)
    assert match is not None
    return match["stem"] + match["ending"]


def _is_of_rank(name: str, of: str | None = None) -> bool:
    """Return whether a file is that of one rank, and stands for a certain file of a process alone."""
    return OF_RANK.fullmatch(name) is not None and of in (None, _without_rank(name))


def _remove_lock(path: Path) -> None:
    """Remove the lock file of a rank that has ended. Raises UserError if the rank still holds it."""
    lock = FolderLock(path)
    path.unlink(missing_ok=True)
    lock.release()
