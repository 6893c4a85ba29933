"""The progress of long work on standard error: a bar on a terminal, and otherwise a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rada_fast.system.terminal import PlainConsole

PLAIN_INTERVAL = 15.0
"""The shortest time between two plain lines, in seconds."""
BAR_INTERVAL = 0.05
"""The shortest time between two updates of the bar on a terminal, in seconds."""


class Advance(Protocol):
    """A function to call whenever steps are finished: advance(2) after two more steps, and perhaps a short note."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Show the progress of a loop while the context lasts. total: the number of steps, or None if nobody knows it."""
    # A process can run without a standard error.
    if sys.stderr is not None and sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=PlainConsole(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            waiting, shown, last_note = 0, 0.0, ""

            def on_terminal(steps: int = 1, note: str = "") -> None:
                # A step of a training may be shorter than ten updates of the bar.
                nonlocal waiting, shown, last_note
                waiting, last_note = waiting + steps, note or last_note
                now = time.monotonic()
                if note or now - shown >= BAR_INTERVAL:
                    bar.update(task, advance=waiting, note=last_note)
                    waiting, shown = 0, now

            yield on_terminal
            bar.update(task, advance=waiting)
        return

    done, start = 0, time.monotonic()
    last = start

    def on_log(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        finished = steps > 0 and total is not None and done >= total and now - start >= PLAIN_INTERVAL
        if now - last >= PLAIN_INTERVAL or finished:
            last = now
            reached = f"{done}"
            if total is not None:
                remaining = (now - start) / max(done, 1) * (total - done)
                reached = f"{done}/{total}, {remaining:.0f} s left"
            # The work goes on even if nobody reads the lines any more.
            with suppress(OSError, ValueError):
                print(f"{title}: {reached} {note}".rstrip(), file=sys.stderr, flush=True)

    yield on_log
