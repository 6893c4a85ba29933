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


def samples(resident: Sequence[float], allocated: Sequence[int] | None = None) -> list[Sample]:
    """Return a sample for each minute, in which 100 pictures are predicted."""
    given = [500 for _ in resident] if allocated is None else allocated
    return [
        Sample(60.0 * minute, 50.0 * minute, 100 * minute, mib, own, 7)
        for minute, (mib, own) in enumerate(zip(resident, given, strict=True))
    ]


def resident_trend(resident: Sequence[float]) -> tuple[Trend, bool]:
    trend = trend_of(samples(resident))
    assert trend is not None
    return trend, is_flat(MEASURES[0], trend)


def test_growth_is_told_from_noise_and_from_the_warm_up() -> None:
    wave = [(-1) ** minute * 0.5 for minute in range(60)]
    assert resident_trend([800 + part for part in wave])[1]
    growing, flat = resident_trend([800 + part + minute / 10 for minute, part in enumerate(wave)])
    assert not flat
    assert growing.slope == pytest.approx(6, rel=0.05)
    constant, flat = resident_trend([700] * 6 + [812] * 54)
    assert (flat, constant.slope) == (True, 0)


def test_growth_below_the_tolerance_is_flat_if_its_noise_allows_to_say_so() -> None:
    assert resident_trend([800 + minute / 120 for minute in range(60)])[1]
    assert not resident_trend([800 + minute / 120 + 9 * (minute % 7 == 0) for minute in range(60)])[1]


def test_a_single_step_counts_as_few_samples() -> None:
    assert resident_trend([800] * 40 + [801] * 20)[0].error > 0.2


def test_an_object_that_is_kept_of_each_picture_is_not_flat() -> None:
    _, in_use, objects = MEASURES
    kept = trend_of(samples([800.0] * 60, [10**8 + 32 * 100 * minute for minute in range(60)]), in_use)
    assert kept is not None
    assert kept.slope == pytest.approx(32)
    assert not is_flat(in_use, kept)
    none = trend_of(samples([800.0] * 60), objects)
    assert none == Trend(0, 0)
    assert is_flat(objects, none)


def test_what_the_c_library_does_not_tell_is_left_out() -> None:
    untold = [sample._replace(allocated_bytes=None) for sample in samples([800.0] * 60)]
    assert trend_of(untold, MEASURES[1]) is None


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
    assert "MiB an hour" in capsys.readouterr().out


def test_names_and_views_differ_in_every_round() -> None:
    names = [name for name, _ in itertools.islice(streaming_memory.endless([Path("a/b.png"), Path("a/c.png")]), 4)]
    assert names == ["0/a/b.png", "0/a/c.png", "1/a/b.png", "1/a/c.png"]


def test_too_few_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        streaming_memory.main(["--seconds", "60"])
    assert caught.value.code == 2
    assert "a slope needs 8 figures or more" in capsys.readouterr().err
