"""A call that hangs is left behind, another thread takes the next calls, and many that hang end the program."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from rada_fast.system import patience


@pytest.fixture(autouse=True)
def _short() -> Iterator[None]:
    patience.set_limit(0.05)
    yield
    patience.set_limit(patience.DEFAULT_LIMIT)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return an event for which hanging calls wait. At the end of the test they go on and end."""
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 10
    while patience.stuck():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_calls_return_and_raise_as_without_a_limit() -> None:
    assert [patience.call(pow, 2, number) for number in range(5)] == [1, 2, 4, 8, 16]
    with pytest.raises(ZeroDivisionError):
        patience.call(divmod, 1, 0)
    assert patience.call(threading.current_thread) is patience.call(threading.current_thread)


def test_a_call_that_hangs_is_left_behind(gate: threading.Event) -> None:
    with pytest.raises(patience.OverdueError):
        patience.call(gate.wait)
    assert patience.stuck() == 1
    assert patience.call(abs, -3) == 3
    gate.set()


def test_too_many_that_hang_end_the_program(gate: threading.Event) -> None:
    patience.set_limit(0.005)
    for _ in range(patience.MOST_STUCK):
        with pytest.raises(patience.OverdueError):
            patience.call(gate.wait)
    with pytest.raises(TimeoutError, match="9 pictures hang at the same time"):
        patience.call(gate.wait)


def test_a_thread_takes_its_helper_with_it() -> None:
    found: list[threading.Thread] = []

    def work() -> None:
        found.append(patience.call(threading.current_thread))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    found[0].join(10)
    assert not found[0].is_alive()


def test_a_process_ends_although_a_thread_hangs() -> None:
    program = """
import os, sys
from rada_fast.system import patience
patience.set_limit(0.05)
reading, writing = os.pipe()
try:
    patience.call(os.read, reading, 1)
except patience.OverdueError:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 7
