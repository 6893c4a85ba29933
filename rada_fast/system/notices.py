"""Warnings for whoever runs a command: each is said once, on standard error, and recorded in the run's summary.

Anything that goes on although it may not be what was meant says so here: notices.warn("..."). A command runs inside
notices.collecting(), which also decorates a function, and its summary holds notices.so_far().
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field

from rada_fast.errors import UserError


@dataclass
class _Said:
    """warnings: those of a run; held: lines to be printed later, or None where they are printed at once."""

    warnings: list[str] = field(default_factory=list)
    held: list[str] | None = None


_outside = _Said()
_said: ContextVar[_Said] = ContextVar("rada_fast_notices", default=_outside)


def warn(message: str) -> None:
    """Say that something may not be what was meant, once in a run, and keep it for the summary.

    message: one line that names the argument or file, what is the matter with it, and what to do.
    """
    message = one_line(" ".join(message.splitlines()))
    said = _said.get()
    if message not in said.warnings:
        said.warnings.append(message)
        _say(f"rada-fast: warning: {message}")


def note(message: str) -> None:
    """Say what is good to know and is as it should be; the summary does not hold it."""
    _say(f"rada-fast: note: {one_line(' '.join(message.splitlines()))}")


def so_far() -> list[str]:
    """The warnings of this run, in the order in which they were first said."""
    return list(_said.get().warnings)


@contextmanager
def collecting(*, hold: bool = False) -> Iterator[None]:
    """Begin a run that has not warned of anything yet; what an outer run has said comes back at the end.

    hold: print nothing before release() or the end. A run that is refused with a UserError then says that alone: what
    was noticed on the way there is of no use to who has to change the command.
    """
    said = _Said(held=[] if hold else None)
    token = _said.set(said)
    try:
        yield
    except UserError:
        said.held = None
        raise
    finally:
        release()
        _said.reset(token)


def release() -> None:
    """Print what was held back, and from now on everything at once: the run is about to take long, or has begun."""
    said = _said.get()
    lines, said.held = said.held or [], None
    for line in lines:
        _print(line)


def one_line(text: str) -> str:
    """A text on one line, what cannot be printed written out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def _say(line: str) -> None:
    held = _said.get().held
    if held is None:
        _print(line)
    else:
        held.append(line)


def _print(line: str) -> None:
    # Without a standard error, or with one that nobody reads any more, the summary alone has it.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
