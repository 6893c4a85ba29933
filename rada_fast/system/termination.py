"""SIGTERM, SIGHUP and Ctrl-C as exceptions that end a command in good order, whichever library is running."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

GRACE = 10.0
"""The most seconds by which work that cannot be left half done delays the end of the process."""
WORDS = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""The signals by which schedulers and terminals end a process, and the word that a command prints for each."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end. Libraries let this exception pass, as they do an interruption from the keyboard."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(WORDS[signal.Signals(number)])
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell reports for a process that the signal has ended."""
        return 128 + self.number


_asked: KeyboardInterrupt | None = None
"""The exception that was raised when the process was asked to end."""
_postponing = False
"""Whether the present work is to be finished first."""


def raise_if_asked() -> None:
    """Raise the exception of a signal again, in case a library has replaced or dropped it."""
    if _asked is not None:
        raise _asked


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise Terminated at the first SIGTERM or SIGHUP, as Ctrl-C raises KeyboardInterrupt; a second ends the process.

    Compiled libraries that call Python, such as torch.save, turn an exception in there into an error of their own;
    such an error becomes the signal's exception again. Nothing changes for a signal that the program itself handles, or
    outside of the main thread.
    """
    global _asked
    ours: dict[int, signal._HANDLER] = dict.fromkeys(WORDS, signal.SIG_DFL)
    ours[signal.SIGINT] = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    ours = {number: usual for number, usual in ours.items() if signal.getsignal(number) is usual}
    if not ours:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        global _asked
        first, _asked = _asked is None, KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        if first and _postponing:
            _repeat_after_grace(number)
            return
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        raise _asked

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if _asked is not None:
            raise _asked from error
        raise
    finally:
        _asked = None
        for number, usual in ours.items():
            signal.signal(number, usual)


def _repeat_after_grace(number: int) -> None:
    """Send a signal to the main thread again after the seconds of GRACE, if the work is not finished then."""

    def repeat() -> None:
        if _postponing:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    timer = threading.Timer(GRACE, repeat)
    timer.daemon = True
    timer.start()


class _Postponed:
    """The context of postponed(). A step of a training enters it, and a generator would take it three times as long."""

    def __enter__(self) -> None:
        global _postponing
        _postponing = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _postponing
        _postponing = False
        if kind is None and _asked is not None:
            raise _asked


_POSTPONED = _Postponed()


def postponed() -> AbstractContextManager[None]:
    """Raise the exception of a signal at the end of the block, as work that is left half done cannot be stored.

    If the block takes longer than GRACE, the exception is raised in it, and so is that of a second signal.
    """
    return _POSTPONED


@contextmanager
def deferred() -> Iterator[None]:
    """Handle a signal at the end of the block, but a second one of its kind at once.

    An exception that a signal raises during the import of PyTorch can be lost, and PyTorch would be half imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    arrived: list[int] = []

    def defer(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, *WORDS):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, defer)
    try:
        yield
    finally:
        for usual, handler in before.items():
            signal.signal(usual, handler)
        for late in arrived:
            signal.raise_signal(late)
