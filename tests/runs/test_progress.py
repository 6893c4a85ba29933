"""The progress of a run is shown as lines with everything that somebody who watches it asks, and left in its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rada_fast.runs import heartbeat, progress
from rada_fast.runs.progress import Counts, Pace, duration, line_of, measured
from rada_fast.system import invocation, notices


class Clock:
    """A Clock shows the time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_those_of_all_the_time_and_of_the_last_minutes() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.rates(0) == (0.0, 0.0)
    for second in range(1, 2001):
        clock.now += 1
        pace.note(2 * min(second, 1000) + max(0, second - 1000))
    overall, recent = pace.rates(3000)
    assert overall == 1.5
    assert recent == pytest.approx(1.0)


def test_a_line_says_what_is_done_and_left_and_how_good_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "present_memory", lambda: {"process_mib": 512.0, "cuda_mib": 3072.0})
    counts = Counts(1200, 50000, 1000, {"zero-shot": 600, "adapted": 655}, 3)
    line = line_of(measured(counts, 10.0, 20.0, "images"), "note")
    assert line == (
        "1,200/50,000, 48,800 left, 20 images/s (10 on average), 41 min left, top-1 zero-shot 60.0 %, adapted 65.5 %, "
        "3 unreadable, 512 MiB of memory, 3.0 GiB of GPU memory, note"
    )


def test_counts_of_several_processes_are_added() -> None:
    both = Counts(3, 10, 2, {"adapted": 1}) + Counts(4, 10, 4, {"zero-shot": 2, "adapted": 3}, 1)
    assert both == Counts(7, 20, 6, {"adapted": 4, "zero-shot": 2}, 1)
    assert (both + Counts(1)).total is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (720, "12 min"), (12000, "3 h 20 min"), (187300, "2 d 4 h"), (3599, "1 h 0 min")],
)
def test_a_length_of_time_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_comes_early_and_then_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(progress.Pace.__init__, "__defaults__", (clock,))
    with progress.progress("work", 2000, gather=lambda own: own + Counts(own.done, own.total)) as advance:
        for _ in range(200):
            clock.now += 1
            advance(answers={"adapted": True}, readable=False)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in printed] == ["work: 30/4", "work: 150/4", "work: 270/4", "work: 390/4"]
    assert all("top-1 adapted 100.0 %" in line and "unreadable" in line for line in printed)


def test_a_run_leaves_its_progress_in_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    invocation.remember(["ttt", "--output", "a b"])
    running = heartbeat.begin(tmp_path)
    notices.warn("something is odd")
    with progress.progress("work", 3, before=Counts(2, 2, 2, {"adapted": 1})) as advance:
        advance(answers={"adapted": True})
        found = json.loads((tmp_path / "progress.json").read_text())
    assert {name: found[name] for name in ("title", "done", "total", "accuracy", "command", "warnings")} == {
        "title": "work",
        "done": 1,
        "total": 3,
        "accuracy": {"adapted": 66.667},
        "command": "rada-fast ttt --output 'a b'",
        "warnings": ["something is odd"],
    }
    heartbeat.end(running)
    running.remove()
    with progress.progress("work", 3) as advance:
        advance()
    assert list(tmp_path.iterdir()) == []
