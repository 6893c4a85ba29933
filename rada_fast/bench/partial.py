"""Keep the figures of a long benchmark while it runs, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rada_fast.bench.stages import Figure
from rada_fast.runs.progress import progress
from rada_fast.system import notices
from rada_fast.system.files import append_line, remove, write_text
from rada_fast.system.terminal import finite

Measure = Callable[[], list[Figure]]


class PartialFigures:
    """The figures of the settings that are measured so far, in a file whose first line says what is measured.

    A file of an interrupted run is taken up if that run had the same options, machine and versions; any other is
    written anew.

    path: the file, or None for figures that nobody keeps.
    request: what is measured, as plain values.
    """

    def __init__(self, path: Path | None, request: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, list[Figure]] = {}
        if path is None:
            return
        header = json.dumps(finite(dict(request)), sort_keys=True)
        self._found = _read(path, header)
        if not self._found:
            write_text(path, header + "\n")

    def __len__(self) -> int:
        return len(self._found)

    def figures_of(self, setting: str) -> list[Figure] | None:
        """Return the lines of figures of a setting that an interrupted run has measured, or None."""
        return self._found.get(setting)

    def keep(self, setting: str, figures: list[Figure]) -> None:
        """Add the lines of figures of a setting."""
        self._found[setting] = figures
        if self._path is not None:
            append_line(self._path, json.dumps(finite({"setting": setting, "figures": figures}), allow_nan=False))

    def finish(self) -> None:
        """Remove the file, after the figures have been written elsewhere."""
        if self._path is not None:
            remove(self._path)


def _read(path: Path, header: str) -> dict[str, list[Figure]]:
    """Return the figures in a file by their settings, or nothing if its first line is another one."""
    try:
        first, *lines = path.read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    if first != header:
        return {}
    # A line that a killed process has left incomplete has no end, so it is the last one.
    entries = [json.loads(line) for line in lines[:-1]]
    return {entry["setting"]: entry["figures"] for entry in entries}


def partial_figures(path: Path | None, options: Any, facts: Mapping[str, Any]) -> PartialFigures:
    """Open the file for the figures of a command, and say how many of them an interrupted run has left.

    path: the file of the finished figures, or None; the file for those of an interrupted run lies beside it.
    options: the options of the command, a dataclass.
    facts: what report.machine_facts returned.
    """
    plain = dataclasses.asdict(options)
    # How the figures are shown does not matter, and their folder is that of the file.
    for where in (plain, plain.get("measuring", {})):
        where.pop("json", None)
        where.pop("output", None)
    request = {"options": plain, "facts": facts}
    found = PartialFigures(None if path is None else path.with_suffix(".partial.jsonl"), request)
    if len(found):
        notices.note(f"{len(found)} settings of an interrupted run of this command are taken over from {path}'s folder")
    return found


def measured_in_turn(title: str, settings: Mapping[str, Measure], partial: PartialFigures) -> Iterator[list[Figure]]:
    """Yield the figures of each setting, measured now or in an interrupted run, and show the progress.

    title: what is measured; settings: for each setting, by its name, the function that measures it.
    """
    with progress(title, len(settings), unit="settings") as advance:
        for name, measure in settings.items():
            advance(0, note=name)
            figures = partial.figures_of(name)
            if figures is None:
                figures = measure()
                partial.keep(name, figures)
            advance()
            yield figures
