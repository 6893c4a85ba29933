"""Work is done ahead of the thread that takes its results, within bounds, and ends with whoever asked for it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from rada_fast import use_backend
from rada_fast.ops import resolve_backend
from rada_fast.system.ahead import Ahead
from tests.support import wait_until_no_thread_is_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_item_has_a_result(threads: int) -> None:
    ahead = Ahead(lambda number, item: (number, item.upper()), "abcdefgh", threads=threads, ahead=4)
    found = []
    while (result := ahead.take()) is not None:
        found.append(result)
        ahead.make_room()
    assert sorted(found) == list(enumerate("ABCDEFGH"))
    assert ahead.ended
    assert ahead.take() is None
    wait_until_no_thread_is_ahead()


def test_no_more_items_are_read_than_there_is_room_for() -> None:
    read: list[int] = []

    def endless() -> Iterator[int]:
        for number in count():
            read.append(number)
            yield number

    ahead = Ahead(lambda number, item: item, endless(), threads=2, ahead=3)
    for _ in range(5):
        assert ahead.take() is not None
        time.sleep(0.02)
        assert len(read) <= 3 + ahead.taken
        ahead.make_room()
    ahead.close()
    wait_until_no_thread_is_ahead()


def test_a_slow_item_holds_back_no_other() -> None:
    slow = threading.Event()

    def work(number: int, item: str) -> str:
        if item == "slow":
            assert slow.wait(10)
        return item

    ahead = Ahead(work, ["slow", "a", "b", "c"], threads=2, ahead=4)
    assert [ahead.take(10) for _ in range(3)] == ["a", "b", "c"]
    assert ahead.take(0) is None
    assert ahead.at_work
    slow.set()
    assert ahead.take(10) == "slow"
    assert not ahead.at_work


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_is_raised_once_and_ends_the_threads(threads: int) -> None:
    def work(number: int, item: int) -> int:
        return 1 // item

    ahead = Ahead(work, [0, 0, 0, 0], threads=threads, ahead=4)
    with pytest.raises(ZeroDivisionError):
        ahead.take()
    if threads:
        assert ahead.take() is None
    ahead.close()
    wait_until_no_thread_is_ahead()


def test_an_exception_of_the_iterable_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("no more")

    ahead = Ahead(lambda number, item: item, broken(), threads=1, ahead=4)
    assert ahead.take() == 1
    with pytest.raises(KeyError, match="no more"):
        ahead.take()


def test_threads_end_with_the_object_even_where_the_source_waits() -> None:
    waiting = threading.Event()

    def waits() -> Iterator[int]:
        yield 1
        waiting.wait(10)

    ahead = Ahead(lambda number, item: item, waits(), threads=2, ahead=4)
    assert ahead.take() == 1
    del ahead
    gc.collect()
    waiting.set()
    wait_until_no_thread_is_ahead()


def test_threads_compute_alone_with_the_callers_backend_and_leave_other_threads_as_they_are() -> None:
    usual = torch.get_num_threads()
    with use_backend("reference"):
        ahead = Ahead(lambda number, item: (torch.get_num_threads(), resolve_backend()), [0], threads=1, ahead=1)
        assert ahead.take() == (1, "reference")
    assert torch.get_num_threads() == usual
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [usual]
