"""Warnings for the user of a command: each is printed once, on standard error, and recorded in the run's summary.

Code that goes on although its input may be a mistake calls notices.warn("..."). A command runs inside
notices.collecting(), which also decorates a function, and its summary contains notices.so_far().
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field

from rada_fast.errors import UserError


@dataclass
class _Notices:
    """The notices of one run.

    warnings: the warnings so far; pending: lines to be printed later, or None if lines are printed at once.
    """

    warnings: list[str] = field(default_factory=list)
    pending: list[str] | None = None


_outside = _Notices()
_current: ContextVar[_Notices] = ContextVar("rada_fast_notices", default=_outside)


def warn(message: str) -> None:
    """Print once in a run that something may be a mistake, and keep it for the summary.

    message: one line that names the argument or file, what is wrong with it, and what to do.
    """
    message = one_line(" ".join(message.splitlines()))
    notices = _current.get()
    if message not in notices.warnings:
        notices.warnings.append(message)
        _print_or_keep(f"rada-fast: warning: {message}")


def note(message: str) -> None:
    """Print something that is useful to know but no mistake. The summary does not contain it."""
    _print_or_keep(f"rada-fast: note: {one_line(' '.join(message.splitlines()))}")


def so_far() -> list[str]:
    """Return the warnings of this run, in the order in which they were first printed."""
    return list(_current.get().warnings)


@contextmanager
def collecting(*, hold: bool = False) -> Iterator[None]:
    """Begin a run without warnings; at its end, the warnings of an outer run are in force again.

    hold: print nothing before release() or the end. A run that is refused with a UserError then prints that error
    alone, because earlier notices do not help a user who has to change the command.
    """
    notices = _Notices(pending=[] if hold else None)
    token = _current.set(notices)
    try:
        yield
    except UserError:
        notices.pending = None
        raise
    finally:
        release()
        _current.reset(token)


def release() -> None:
    """Print the pending lines, and from now on every line at once: the run can no longer be refused."""
    notices = _current.get()
    lines, notices.pending = notices.pending or [], None
    for line in lines:
        _print(line)


def discard() -> None:
    """Drop the lines that wait to be printed, because a report contains them."""
    if (pending := _current.get().pending) is not None:
        pending.clear()


def one_line(text: str) -> str:
    """Return a text on one line, with escape sequences for characters that cannot be printed."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def _print_or_keep(line: str) -> None:
    pending = _current.get().pending
    if pending is None:
        _print(line)
    else:
        pending.append(line)


def _print(line: str) -> None:
    # If there is no standard error, or nobody reads it any more, the summary alone contains the line.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
