"""Warnings for whoever runs a command: each is said once, on standard error, and recorded in the run's summary.

Anything that goes on although it may not be what was meant says so here: notices.warn("..."). A command runs inside
notices.collecting(), which also decorates a function, and its summary holds notices.so_far().
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

_said: ContextVar[list[str] | None] = ContextVar("rada_fast_notices", default=None)
_outside: list[str] = []
"""What was said outside of any collecting()."""


def warn(message: str) -> None:
    """Say that something may not be what was meant, once in a run, and keep it for the summary.

    message: one line that names the argument or file, what is the matter with it, and what to do.
    """
    message = " ".join(message.splitlines())
    said = _current()
    if message not in said:
        said.append(message)
        _print(f"rada-fast: warning: {message}")


def note(message: str) -> None:
    """Say what is good to know and is as it should be; the summary does not hold it."""
    _print(f"rada-fast: note: {' '.join(message.splitlines())}")


def so_far() -> list[str]:
    """The warnings of this run, in the order in which they were first said."""
    return list(_current())


@contextmanager
def collecting() -> Iterator[None]:
    """Begin a run that has not warned of anything yet; what an outer run has said comes back at the end."""
    token = _said.set([])
    try:
        yield
    finally:
        _said.reset(token)


def _current() -> list[str]:
    said = _said.get()
    return _outside if said is None else said


def _print(line: str) -> None:
    # Without a standard error, or with one that nobody reads any more, the summary alone has it.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
