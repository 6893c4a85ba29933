"""Calls that may hang, such as the decoding of a file on a network mount, and how long to wait for them.

Nothing can end a thread from outside. A call that takes too long therefore goes on in the thread in which it was made,
while the program goes on without its result: another thread takes the next calls. Such a thread is left behind as a
daemon, which ends when its call does and does not keep the process from ending. When many threads hang at the same
time, something else than single files is at fault, and the program ends.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

DEFAULT_LIMIT = 60.0
"""The seconds after which a call counts as hanging, where no option says otherwise."""
MOST_STUCK = 8
"""The most threads that may hang at the same time."""


class OverdueError(Exception):
    """A call has not returned in time, and goes on in a thread that was left behind."""


_limit = DEFAULT_LIMIT
_lock = threading.Lock()
_stuck = 0
_own = threading.local()
"""The helper of each thread that makes calls, in its attribute helper."""


def set_limit(seconds: float) -> None:
    """Set how many seconds calls may take from now on, in all threads and in processes that are started later."""
    global _limit
    _limit = seconds


def limit() -> float:
    """Return how many seconds a call may take."""
    return _limit


def stuck() -> int:
    """Return how many threads hang at present."""
    with _lock:
        return _stuck


class _Helper:
    """A thread that makes calls for another one, one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.left_behind = False
        self.finished = False
        self._thread = threading.Thread(target=self._run, name="rada_fast patience", daemon=True)
        self._thread.start()

    def begin(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._calls.put((function, arguments))

    def end(self) -> None:
        """Let the thread end when it has nothing to do any more."""
        self._calls.put(None)

    def _run(self) -> None:
        global _stuck
        while (call := self._calls.get()) is not None:
            function, arguments = call
            result: tuple[Any, BaseException | None]
            try:
                result = function(*arguments), None
            except BaseException as error:
                result = None, error
            with _lock:
                self.finished = True
                if self.left_behind:
                    _stuck -= 1
                    return
            self.results.put(result)
            # Nothing of a call is kept while the thread waits for the next one.
            del call, function, arguments, result

    def leave_behind(self) -> bool:
        """Expect no result any more. Returns whether the call still goes on."""
        global _stuck
        with _lock:
            if self.finished:
                return False
            self.left_behind = True
            _stuck += 1
            return True


class _Handle:
    """Keep a helper for the thread that calls it, and let it end with that thread."""

    def __init__(self) -> None:
        self.helper = _Helper()

    def __del__(self) -> None:
        self.helper.end()


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in another thread, and return its result or raise its exception.

    Raises OverdueError if the call takes longer than limit(), and TimeoutError if too many calls hang.
    """
    handle: _Handle | None = getattr(_own, "handle", None)
    if handle is None:
        handle = _own.handle = _Handle()
    helper = handle.helper
    helper.finished = False
    helper.begin(function, arguments)
    try:
        value, error = helper.results.get(timeout=_limit)
    except queue.Empty:
        if helper.leave_behind():
            _own.handle = None
            check_not_too_many()
            raise OverdueError from None
        value, error = helper.results.get()
    except BaseException:  # the user has interrupted the wait
        helper.leave_behind()
        _own.handle = None
        raise
    if error is not None:
        raise error
    result: Result = value
    return result


def check_not_too_many() -> None:
    """Raise TimeoutError if more threads hang than are allowed."""
    if (count := stuck()) > MOST_STUCK:
        raise TimeoutError(
            f"{count} pictures hang at the same time, each for more than {_limit:g} s: the disk or the network does "
            "not answer"
        )


def _forget_in_child() -> None:
    # A forked process has none of these threads.
    global _stuck, _own, _lock
    _stuck, _own, _lock = 0, threading.local(), threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
