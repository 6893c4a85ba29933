"""The tool that watches the memory of a stream of pictures tells growth from noise."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import streaming_memory
from benchmarks.streaming_memory import Sample, trend_of


def samples(resident: list[float]) -> list[Sample]:
    return [Sample(60.0 * minute, 50.0 * minute, 100 * minute, mib) for minute, mib in enumerate(resident)]


def test_growth_is_told_from_noise_and_from_the_warm_up() -> None:
    wave = [(-1) ** minute * 0.5 for minute in range(60)]
    assert trend_of(samples([800 + part for part in wave])).is_flat
    growing = trend_of(samples([800 + part + minute / 10 for minute, part in enumerate(wave)]))
    assert not growing.is_flat
    assert growing.slope == pytest.approx(6, rel=0.05)
    constant = trend_of(samples([700] * 6 + [812] * 54))
    assert (constant.is_flat, constant.slope) == (True, 0)


def test_a_single_step_counts_as_few_samples() -> None:
    step = trend_of(samples([800] * 40 + [801] * 20))
    assert step.error > 0.2


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
    log = tmp_path / "memory.jsonl"
    assert streaming_memory.main(["--seconds", "0.8", "--every", "0.02", "--log", str(log)]) in (0, 1)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= 8
    assert lines[-1]["pictures"] >= len(lines) - 1
    assert "MiB an hour" in capsys.readouterr().out


def test_names_and_views_differ_in_every_round() -> None:
    names = [name for name, _ in itertools.islice(streaming_memory.endless([Path("a/b.png"), Path("a/c.png")]), 4)]
    assert names == ["0/a/b.png", "0/a/c.png", "1/a/b.png", "1/a/c.png"]


def test_too_few_figures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        streaming_memory.main(["--seconds", "60"])
    assert caught.value.code == 2
    assert "a slope needs 8 figures or more" in capsys.readouterr().err
