"""The progress of long work on standard error: a bar on a terminal, and otherwise a plain line every minute.

Both show what is done and left, the rate, the time left, the accuracy so far and the memory. A run also leaves the same
numbers in its folder, see heartbeat.py, so that another program can watch it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rada_fast.runs import heartbeat
from rada_fast.system.memory import present_memory
from rada_fast.system.terminal import PlainConsole

PLAIN_INTERVAL = 60.0
"""The shortest time between two plain lines, in seconds. A log of three days then has 4,320 lines."""
FIRST_LINE = 15.0
"""The seconds after which the first plain line comes, so that whoever has started a run soon sees that it goes."""
BAR_INTERVAL = 0.05
"""The shortest time between two updates of the bar on a terminal, in seconds."""
RECENT = 300.0
"""The seconds over which the recent rate is taken. It shows what a mean over days would hide."""
SAMPLES = 60
"""The most points in time that the recent rate remembers."""


@dataclass(frozen=True)
class Counts:
    """What some work has finished so far. Counts of several processes can be added.

    done: the number of finished steps.
    total: the number of steps in all, or None if nobody knows it.
    labelled: the images among them whose class is known.
    right: how many of these were answered rightly, by the name of the answer, such as "zero-shot" and "adapted".
    unreadable: the images that could not be read.
    """

    done: int = 0
    total: int | None = None
    labelled: int = 0
    right: Mapping[str, int] = field(default_factory=dict)
    unreadable: int = 0

    def __add__(self, other: Counts) -> Counts:
        total = None if self.total is None or other.total is None else self.total + other.total
        right = {name: self.right.get(name, 0) + other.right.get(name, 0) for name in {**self.right, **other.right}}
        return Counts(
            self.done + other.done, total, self.labelled + other.labelled, right, self.unreadable + other.unreadable
        )

    def accuracies(self) -> dict[str, float]:
        """Return the share of right answers in percent, by the name of the answer."""
        if not self.labelled:
            return {}
        return {name: round(100 * right / self.labelled, 3) for name, right in self.right.items()}


class Pace:
    """The rate of some work: over all of it, and over its last minutes.

    clock: a function that returns the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start = clock()
        self._points: deque[tuple[float, int]] = deque([(self.start, 0)])

    def note(self, done: int) -> None:
        """Remember how many steps are done now."""
        now = self._clock()
        if now - self._points[-1][0] >= RECENT / SAMPLES:
            self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[1][0] >= RECENT:
            self._points.popleft()

    def rates(self, done: int) -> tuple[float, float]:
        """Return the steps in a second, over all the time and over the last minutes."""
        now = self._clock()
        then, before = self._points[0]
        overall = done / (now - self.start) if now > self.start else 0.0
        return overall, (done - before) / (now - then) if now > then else overall


def duration(seconds: float) -> str:
    """Return a length of time in words, in the two units that matter: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def measured(counts: Counts, overall: float, recent: float, unit: str) -> dict[str, Any]:
    """Return what is known of the progress as plain values, as a program reads them.

    counts: what is finished; if work was finished before the rates were taken, it is not among it.
    overall, recent: the rates.
    unit: the word for what is counted.
    """
    left = None if counts.total is None else max(0, counts.total - counts.done)
    rate = recent or overall
    return {
        "done": counts.done,
        "total": counts.total,
        "unit": unit,
        "per_second": round(overall, 4),
        "recent_per_second": round(recent, 4),
        "seconds_left": None if left is None or not rate else round(left / rate, 1),
        "accuracy": counts.accuracies(),
        "unreadable": counts.unreadable,
        "memory": present_memory(),
    }


def line_of(values: Mapping[str, Any], note: str = "") -> str:
    """Return the progress as one line of text. values: what measured() returns, of one process or of several."""
    parts = []
    if values["total"] is None:
        parts.append(f"{values['done']:,}")
    else:
        left = values["total"] - values["done"]
        parts.append(f"{values['done']:,}/{values['total']:,}" + (f", {left:,} left" if left else ""))
    parts += details(values)
    return ", ".join([*parts, *([note] if note else [])])


def details(values: Mapping[str, Any]) -> list[str]:
    """Return what is known of the progress besides the number of finished steps, in words."""
    parts = []
    if values["per_second"]:
        parts.append(f"{values['recent_per_second']:.4g} {values['unit']}/s ({values['per_second']:.4g} on average)")
    if values["seconds_left"]:
        parts.append(f"{duration(values['seconds_left'])} left")
    if values["accuracy"]:
        parts.append("top-1 " + ", ".join(f"{name} {share:.1f} %" for name, share in values["accuracy"].items()))
    if values["unreadable"]:
        parts.append(f"{values['unreadable']} unreadable")
    memory = values["memory"]
    if memory.get("process_mib"):
        parts.append(f"{_mib(memory['process_mib'])} of memory")
    if memory.get("cuda_mib"):
        parts.append(f"{_mib(memory['cuda_mib'])} of GPU memory")
    return parts


def _mib(value: float) -> str:
    return f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:.0f} MiB"


class Advance(Protocol):
    """A function to call whenever steps are finished: advance(2) after two more steps, and perhaps a short note.

    answers: for a labelled image, whether each answer to it was right, by the name of the answer.
    readable: whether the images could be read.
    """

    def __call__(
        self, steps: int = 1, note: str = "", *, answers: Mapping[str, bool] | None = None, readable: bool = True
    ) -> None: ...


@contextmanager
def progress(
    title: str,
    total: int | None,
    *,
    unit: str = "images",
    before: Counts | None = None,
    gather: Callable[[Counts], Counts] | None = None,
) -> Iterator[Advance]:
    """Show the progress of a loop while the context lasts.

    title: what the loop does.
    total: the number of its steps, or None if nobody knows it.
    unit: the word for its steps.
    before: what earlier runs have done, in all processes, where this one goes on from there.
    gather: a function from the counts of this process to those of all processes that share the work. It is called
        after every step. Without it, this process does all the work.
    """
    state = _State(title, unit, total, before, gather)
    # A process can run without a standard error.
    if sys.stderr is not None and sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=PlainConsole(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")
            shown = 0.0

            def show() -> None:
                values = state.values()
                bar.update(
                    task, completed=values["done"], total=values["total"],
                    note=", ".join([*details(values), *([state.note] if state.note else [])]),
                )  # fmt: skip

            def on_terminal(
                steps: int = 1, note: str = "", *, answers: Mapping[str, bool] | None = None, readable: bool = True
            ) -> None:
                # A step of a training may be shorter than ten updates of the bar.
                nonlocal shown
                now = state.add(steps, note, answers, readable)
                if note or now - shown >= BAR_INTERVAL:
                    show()
                    shown = now

            yield on_terminal
            show()
        state.leave()
        return

    last, ended = state.pace.start - PLAIN_INTERVAL + FIRST_LINE, False

    def on_log(
        steps: int = 1, note: str = "", *, answers: Mapping[str, bool] | None = None, readable: bool = True
    ) -> None:
        nonlocal last, ended
        now = state.add(steps, note, answers, readable)
        # After its last step, a training says in a note of its own what the last epoch has come to.
        awaited = bool(state.note) and (steps > 0 or not note)
        finished = not ended and state.is_finished() and not awaited
        if now - last >= PLAIN_INTERVAL or (finished and now - state.pace.start >= FIRST_LINE):
            last, ended = now, ended or finished
            # The work goes on even if nobody reads the lines any more.
            with suppress(OSError, ValueError):
                print(f"{title}: {line_of(state.values(), state.note)}", file=sys.stderr, flush=True)

    yield on_log
    state.leave()


class _State:
    """What progress() knows of its loop."""

    def __init__(
        self, title: str, unit: str, total: int | None, before: Counts | None, gather: Callable[[Counts], Counts] | None
    ) -> None:
        self._title, self._unit, self._gather = title, unit, gather
        self._earlier = None if before is None else before.done
        before = before or Counts()
        self._before = Counts(0, 0, before.labelled, before.right, before.unreadable)
        self.total, self.done, self._labelled, self._unreadable = total, 0, 0, 0
        self._right: dict[str, int] = {}
        self.note, self.pace, self._due = "", Pace(), 0.0
        self._gathered()
        heartbeat.beat(self._own)

    def add(self, steps: int, note: str, answers: Mapping[str, bool] | None, readable: bool) -> float:
        """Count finished steps, and return the time. A step of a training may take no more than a millisecond."""
        self.done += steps
        if answers is not None:
            self._labelled += 1
            for name, right in answers.items():
                self._right[name] = self._right.get(name, 0) + right
        if not readable:
            self._unreadable += steps
        if note:
            self.note = note
        if self._gather is None:
            self._all_done = self.done
        else:
            self._gathered()
        now = time.monotonic()
        if now >= self._due:
            self._due = now + min(heartbeat.INTERVAL, BAR_INTERVAL)
            self.pace.note(self._all_done)
            heartbeat.beat(self._own)
        return now

    def values(self) -> dict[str, Any]:
        """Return the progress of all processes as plain values."""
        return self._of(self._gathered())

    def is_finished(self) -> bool:
        """Return whether all processes have finished their steps."""
        return self._all_done > 0 and self._all_done == self._all_total

    def _gathered(self) -> Counts:
        """Return the counts of all processes, and remember their finished steps and their steps in all."""
        counts = self._counts()
        if self._gather is not None:
            counts = self._gather(counts)
        self._all_done, self._all_total = counts.done, counts.total
        return counts

    def _counts(self) -> Counts:
        return Counts(self.done, self.total, self._labelled, dict(self._right), self._unreadable)

    def _of(self, counts: Counts) -> dict[str, Any]:
        overall, recent = self.pace.rates(self._all_done)
        share = counts.done / self._all_done if self._all_done else 1.0
        return measured(counts + self._before, share * overall, share * recent, self._unit)

    def _own(self) -> dict[str, Any]:
        own = {"title": self._title, "note": self.note, "earlier": self._earlier}
        return {**own, **self._of(self._counts())}

    def leave(self) -> None:
        """Write down the end of the loop."""
        heartbeat.beat(self._own, at_once=True)
