"""The tool that watches the memory of a stream of pictures tells growth from noise."""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import streaming_memory
from benchmarks.streaming_memory import MEASURES, Sample, Trend, is_flat, trend_of

IN_USE, OBJECTS = MEASURES


def samples(in_use: Sequence[float]) -> list[Sample]:
    """Return a sample for each minute, in which 100 pictures are predicted."""
    return [Sample(60.0 * minute, 50.0 * minute, 100 * minute, 800.0, int(own), 7) for minute, own in enumerate(in_use)]


def growth(in_use: Sequence[float]) -> tuple[Trend, bool]:
    trend = trend_of(samples(in_use), IN_USE)
    assert trend is not None
    return trend, is_flat(IN_USE, trend)


def test_growth_is_told_from_noise_and_from_the_warm_up() -> None:
    wave = [(-1) ** minute * 5e4 for minute in range(60)]
    assert growth([1e8 + part for part in wave])[1]
    # An object of 32 bytes that is kept of each picture.
    growing, flat = growth([1e8 + part + 3200 * minute for minute, part in enumerate(wave)])
    assert not flat
    assert growing.slope == pytest.approx(32, rel=0.1)
    constant, flat = growth([7e7] * 6 + [8.12e7] * 54)
    assert (flat, constant.slope) == (True, 0)


def test_growth_below_the_tolerance_is_flat_if_its_noise_allows_to_say_so() -> None:
    assert growth([1e8 + 500 * minute for minute in range(60)])[1]
    assert not growth([1e8 + 500 * minute + 1e6 * (minute % 7 == 0) for minute in range(60)])[1]


def test_a_single_step_counts_as_few_samples() -> None:
    assert growth([1e8] * 40 + [1e8 + 1e6] * 20)[0].error > 50


def test_a_block_of_python_that_is_kept_of_each_picture_is_not_flat() -> None:
    none, kept = (
        trend_of([one._replace(python_blocks=10**6 + blocks * one.pictures) for one in samples([1e8] * 60)], OBJECTS)
        for blocks in (0, 1)
    )
    assert none == Trend(0, 0)
    assert is_flat(OBJECTS, none)
    assert kept is not None
    assert not is_flat(OBJECTS, kept)


def test_what_the_c_library_does_not_tell_is_left_out() -> None:
    untold = [sample._replace(allocated_bytes=None) for sample in samples([1e8] * 60)]
    assert trend_of(untold, IN_USE) is None


def test_the_rise_of_resident_memory_is_counted_from_the_end_of_the_warm_up() -> None:
    resident = [700.0] * 6 + [800.0] * 30 + [808.0] * 10 + [804.0] * 14
    found = [one._replace(resident_mib=own) for one, own in zip(samples([1e8] * 60), resident, strict=True)]
    assert streaming_memory.resident_rise(found) == pytest.approx(0.01)


class QuickPredictor:
    """Takes the place of the predictor, and predicts a picture in ten milliseconds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def stream(self, pictures: Iterable[Any]) -> Generator[Any]:
        for picture in pictures:
            time.sleep(0.01)
            yield picture


def test_it_streams_and_writes_every_figure_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_memory, "TestTimePredictor", QuickPredictor)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # The objects of all tests take it long.
    log = tmp_path / "memory.jsonl"
    assert streaming_memory.main(["--seconds", "0.8", "--every", "0.05", "--log", str(log)]) in (0, 1)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= 8
    assert lines[-1]["pictures"] >= len(lines) - 1
    assert lines[-1]["python_blocks"] > 0
    assert "more than after the warm-up" in capsys.readouterr().out


def test_names_and_views_differ_in_every_round() -> None:
    names = [name for name, _ in itertools.islice(streaming_memory.endless([Path("a/b.png"), Path("a/c.png")]), 4)]
    assert names == ["0/a/b.png", "0/a/c.png", "1/a/b.png", "1/a/c.png"]


def test_too_few_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        streaming_memory.main(["--seconds", "60"])
    assert caught.value.code == 2
    assert "a slope needs 8 figures or more" in capsys.readouterr().err
