"""The times of stages add up over threads, in the order of the stages."""

from __future__ import annotations

import threading

import pytest

from rada_fast.engine.stages import TTT_STAGES, StageTimes


def test_times_add_up_whichever_thread_measured_them() -> None:
    times = StageTimes(("encode", "adapt"))
    threads = [threading.Thread(target=times.add, args=("encode", 0.25)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.add("adapt", 1.5)
    assert times.seconds() == {"encode": 2.0, "adapt": 1.5}
    with pytest.raises(KeyError):
        times.add("decode", 1.0)


def test_a_stage_that_fails_was_busy_too() -> None:
    times = StageTimes()
    with pytest.raises(ValueError, match="spoilt"), times.busy("decode"):
        raise ValueError("spoilt")
    assert times.seconds()["decode"] > 0
    assert tuple(times.seconds()) == TTT_STAGES


def test_the_times_that_were_returned_do_not_change() -> None:
    times = StageTimes(("encode",))
    before = times.seconds()
    times.add("encode", 1.0)
    assert before == {"encode": 0.0}
