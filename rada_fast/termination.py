"""SIGTERM, by which schedulers and containers end a process, as an exception that ends a command in good order."""

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


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise Terminated at the first SIGTERM; a second one ends the process at once.

    A program that has an answer of its own to the signal, or runs this outside of its main thread, keeps its way.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
