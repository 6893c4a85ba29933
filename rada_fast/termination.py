"""SIGTERM and Ctrl-C as exceptions that end a command in good order, whatever library they come up in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM has ended."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end. Like an interruption from the keyboard, libraries let it pass."""


_asked: KeyboardInterrupt | None = None
"""What was raised when the process was asked to end."""


def raise_if_asked() -> None:
    """Raise again what a signal has raised, where a library has taken it for an error of its own or dropped it."""
    if _asked is not None:
        raise _asked


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise Terminated at the first SIGTERM, as Ctrl-C raises KeyboardInterrupt; a second SIGTERM ends the process.

    Compiled libraries that call Python, torch.save for one, turn whatever is raised there into errors of their own:
    such an error becomes the signal's exception again. A program that has an answer of its own to a signal, or runs
    this outside of its main thread, keeps its way.
    """
    global _asked
    ours: dict[int, signal._HANDLER] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    ours = {number: usual for number, usual in ours.items() if signal.getsignal(number) is usual}
    if not ours:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        global _asked
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _asked = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
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
