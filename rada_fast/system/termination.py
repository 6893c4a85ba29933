"""SIGTERM, SIGHUP and Ctrl-C as exceptions that end a command in good order, whatever library they come up in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WORDS = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""The signals by which schedulers and terminals end a process, and what a command says when it ends by one."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end. Like an interruption from the keyboard, libraries let it pass."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(WORDS[signal.Signals(number)])
        self.number = number

    @property
    def status(self) -> int:
        """What a shell reports of a process that the signal has ended."""
        return 128 + self.number


_asked: KeyboardInterrupt | None = None
"""What was raised when the process was asked to end."""


def raise_if_asked() -> None:
    """Raise again what a signal has raised, where a library has taken it for an error of its own or dropped it."""
    if _asked is not None:
        raise _asked


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise Terminated at the first SIGTERM or SIGHUP, as Ctrl-C raises KeyboardInterrupt; a second ends the process.

    Compiled libraries that call Python, torch.save for one, turn whatever is raised there into errors of their own:
    such an error becomes the signal's exception again. A program that has an answer of its own to a signal, or runs
    this outside of its main thread, keeps its way.
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
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        _asked = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
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


@contextmanager
def held() -> Iterator[None]:
    """Answer a signal only at the end, and a second one of its kind at once.

    While PyTorch is imported, an exception raised by a signal can be swallowed, and would leave it half imported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, *WORDS):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, hold)
    try:
        yield
    finally:
        for held_back, handler in before.items():
            signal.signal(held_back, handler)
        for asked in came:
            signal.raise_signal(asked)
