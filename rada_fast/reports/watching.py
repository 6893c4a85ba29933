"""The command status: how runs stand, once or again and again until they end."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from rada_fast.config.tools import StatusOptions
from rada_fast.errors import UserError
from rada_fast.reports.status import DAMAGED, INTERRUPTED, RUNNING, Status, Watched
from rada_fast.runs.contents import FILES_OF_COMMAND, IDENTITY_FILE, LOCK_FILE
from rada_fast.runs.lock import Owner
from rada_fast.runs.progress import duration
from rada_fast.system.terminal import PlainConsole, print_json, table

LIVE_INTERVAL, LINE_INTERVAL = 1.0, 60.0
"""The seconds between two looks at the folders with --follow: on a terminal, and elsewhere."""

TITLES_OF_IMAGES = ("test-time training", "predict")
"""What the commands say that they do while they write a line for each image."""


def run_status(options: StatusOptions) -> int:
    """Show how runs stand. Returns the exit status: 2 where a folder is not that of a run, or is damaged.

    Raises UserError if no folder is that of a run.
    """
    watched, foreign = find_runs([Path(folder).expanduser() for folder in options.folders])
    if not watched:
        raise UserError(foreign[0])
    for fault in foreign:
        print(f"rada-fast: {fault}", file=sys.stderr)
    found = [run.look() for run in watched]
    console = PlainConsole()
    live = options.follow and console.is_terminal and not options.json
    if not live:
        _show(console, found, options)
    if options.follow:
        found = _follow_live(console, watched, found) if live else _follow(watched, found, options)
    damaged = [one for one in found if one.state == DAMAGED]
    for one in damaged:
        print(f"rada-fast: folder {one.folder}: {one.fault}", file=sys.stderr)
    return 2 if foreign or damaged else 0


def find_runs(folders: Sequence[Path]) -> tuple[list[Watched], list[str]]:
    """Return the runs in some folders and below them, and a line about each folder without any."""
    found: dict[Path, None] = {}
    foreign = []
    for folder in folders:
        runs = list(_runs_below(folder)) if folder.is_dir() else []
        found |= dict.fromkeys(runs)
        if not folder.is_dir():
            foreign.append(f"folder {folder} {'is a file' if folder.exists() else 'does not exist'}")
        elif not runs:
            foreign.append(f"folder {folder} is not that of a run and holds none: no {IDENTITY_FILE} is in it")
    return [Watched(folder) for folder in found], foreign


def _runs_below(folder: Path) -> Iterator[Path]:
    """Yield the folder itself if a run has written into it, and otherwise all such folders below it."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:  # it may not be read
        return
    if IDENTITY_FILE in names or LOCK_FILE in names:
        yield folder
        return
    # The results of a run that has lost its identity are shown too.
    if names & (set.union(*map(set, FILES_OF_COMMAND.values())) - {"tensorboard", "wandb"}) and "images.jsonl" in names:
        yield folder
        return
    for name in sorted(names):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            yield from _runs_below(path)


def _show(console: PlainConsole, found: Sequence[Status], options: StatusOptions) -> None:
    if options.json:
        print_json([dataclasses.asdict(one) for one in found], indent=None if options.follow else 2)
        return
    for one in found:
        console.print(_shown(one), soft_wrap=True)


def _follow(watched: Sequence[Watched], found: Sequence[Status], options: StatusOptions) -> list[Status]:
    """Print a line for each run every minute, until none of them goes on."""
    found, shown = list(found), time.monotonic()
    while any(one.state == RUNNING for one in found):
        time.sleep(LIVE_INTERVAL)
        before, found = found, [run.look() for run in watched]
        ended = [one for one, old in zip(found, before, strict=True) if old.state == RUNNING != one.state]
        due = time.monotonic() - shown >= LINE_INTERVAL
        if options.json and (due or ended):
            print_json([dataclasses.asdict(one) for one in found], indent=None)
        elif not options.json:
            for one in found if due else ended:
                print(line_about(one), flush=True)
        shown = time.monotonic() if due else shown
    return found


def _follow_live(console: PlainConsole, watched: Sequence[Watched], found: list[Status]) -> list[Status]:
    """Show the tables of runs in place, until none of the runs goes on."""

    def tables() -> Group:
        return Group(*map(_shown, found))

    with Live(tables(), console=console, auto_refresh=False) as live:
        while any(one.state == RUNNING for one in found):
            time.sleep(LIVE_INTERVAL)
            found = [run.look() for run in watched]
            live.update(tables(), refresh=True)
    return found


def line_about(one: Status) -> str:
    """Return one line about a run."""
    return f"{one.folder}: {one.state}, " + ", ".join(f"{name} {value}" for name, value in rows_of(one))


def rows_of(one: Status) -> list[tuple[str, Any]]:
    """Return what is known of a run as names and texts."""
    rows: list[tuple[str, Any]] = []
    if one.fault:
        rows.append(("fault", one.fault))
    if one.command:
        rows.append(("command", one.command + (f" in {one.ranks} processes" if one.ranks > 1 else "")))
    for owner in one.owners:
        rows.append(("running in" if one.state == RUNNING else "last run by", _owner(owner)))
    if one.images_in_all is not None:
        left = one.images_in_all - one.images
        rows.append(("images", f"{one.images:,} of {one.images_in_all:,}" + (f", {left:,} left" if left else "")))
    elif one.images:
        rows.append(("images", f"{one.images:,}"))
    if one.epochs is not None:
        rows.append(("epochs", f"{one.epochs}" + (f" of {one.epochs_in_all}" if one.epochs_in_all else "")))
    if one.loss is not None:
        right = "" if one.train_top1 is None else f", {one.train_top1:.1f} % of the training images right"
        rows.append(("loss", f"{one.loss:.4f}{right}"))
    if one.title:
        # The lines of the images, counted above, are newer than the progress, which is written every few seconds.
        total = "" if one.total is None else f" of {one.total:,}"
        counted = "" if one.title in TITLES_OF_IMAGES else f": {one.done:,}{total}"
        text = f"{one.title}{counted}" + (f", {one.note}" if one.note else "")
        rows.append(("at present" if one.state == RUNNING else "ended during", text))
    if one.per_second:
        recent = (
            "" if one.recent_per_second is None else f"{one.recent_per_second:.4g} {one.unit}/s in the last 5 minutes, "
        )
        rows.append(("rate", f"{recent}{one.per_second:.4g} {one.unit}/s on average"))
    if one.state == RUNNING and one.seconds_left is not None:
        rows.append(("time left", duration(one.seconds_left)))
    for name, accuracies in one.accuracy.items():
        shares = ", ".join(f"{answer} {share:.2f} %" for answer, share in accuracies.items())
        rows.append((f"top-1 {name}".strip(), shares))
    for name, count in (
        ("unreadable", one.unreadable),
        ("diverged", one.diverged),
        ("damaged lines", one.damaged_lines),
    ):
        if count:
            rows.append((name, f"{count:,}"))
    if one.memory:
        rows.append(
            ("memory", ", ".join(f"{name.removesuffix('_mib')} {size:,.0f} MiB" for name, size in one.memory.items()))
        )
    rows.append(("on disk", f"{one.bytes / 2**20:,.1f} MiB"))
    if one.state == RUNNING and one.updated is not None:
        rows.append(("last update", f"{duration(max(0.0, time.time() - one.updated))} ago"))
    return rows


def notes_of(one: Status) -> list[str]:
    """Return the lines about a run that are too long for a table: its warnings, and the command that goes on."""
    lines = [f"warning: {warning}" for warning in one.warnings]
    if one.state == INTERRUPTED:
        lines.append(f"to go on: {one.resume or 'start the same command again'}")
    return lines


def _shown(one: Status) -> Group:
    """Return the table and the lines about a run."""
    return Group(table(f"{one.folder}: {one.state}", rows_of(one)), *map(Text, notes_of(one)))


def _owner(owner: Owner) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return f"process {owner.process} on {owner.host} since {since}"
