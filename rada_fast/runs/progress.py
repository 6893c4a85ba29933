"""Progress of long work: a bar on a terminal, now and then a plain line elsewhere. All of it on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rada_fast.system.terminal import PlainConsole

PLAIN_INTERVAL = 15.0
"""Seconds between two plain lines."""


class Advance(Protocol):
    """Call it as work gets done: advance(2) after two more, with a note on how it goes if there is one."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show how far a loop of known length has come. total: steps in all."""
    # A command can run without a standard error, and then without telling how far it is.
    if sys.stderr is not None and sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=PlainConsole(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")

            def on_terminal(steps: int = 1, note: str = "") -> None:
                bar.update(task, advance=steps, note=note)

            yield on_terminal
        return

    done, start = 0, time.monotonic()
    last = start

    def on_log(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        finished = steps > 0 and done >= total and now - start >= PLAIN_INTERVAL
        if now - last >= PLAIN_INTERVAL or finished:
            last = now
            left = (now - start) / max(done, 1) * (total - done)
            # Nobody may read it any more: the work goes on.
            with suppress(OSError, ValueError):
                print(f"{title}: {done}/{total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)

    yield on_log
