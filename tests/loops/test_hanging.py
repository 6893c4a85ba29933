"""A picture that hangs is recorded as unreadable after a stated time, and the run goes on without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rada_fast.config.inference import FeaturesOptions
from rada_fast.config.options import RunOptions
from rada_fast.data import decode
from rada_fast.data.stored import Location
from rada_fast.loops.eft import run_eft
from rada_fast.loops.extraction import run_features
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.system import patience

from .support import eft_options, fft_options, lines, ttt_options

LIMIT = 0.3
REASON = f"0.png cannot be read: reading it has not ended within {LIMIT:g} s (--timeout)"

Commands = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]


def ttt(data: Path, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    return run_ttt(ttt_options(data, output, run=run))


def features(data: Path, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    return run_features(FeaturesOptions(f"imagefolder:{data}", run=RunOptions(output=str(output), **run)))


def eft(data: Path, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    return run_eft(eft_options(data, data, output, run=run, train_views="crop", protocol="all"))


def fft(data: Path, output: Path, run: dict[str, Any]) -> dict[str, Any]:
    return run_fft(fft_options(data, data, output, run=run))


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Let the reading of cat/0.png hang until the test ends. Add other words to the set to let their files hang too."""
    gate, words, read, load = threading.Event(), {"cat/0.png"}, decode._read_image, decode._load_into_cache

    def wait(place: Location) -> None:
        if any(word in str(place) for word in words):
            gate.wait(60)

    def read_or_hang(place: Location) -> Image.Image:
        wait(place)
        return read(place)

    def load_or_hang(path: Path) -> None:
        wait(path)
        load(path)

    monkeypatch.setattr(decode, "_read_image", read_or_hang)
    monkeypatch.setattr(decode, "_load_into_cache", load_or_hang)
    yield words
    gate.set()
    patience.set_limit(patience.DEFAULT_LIMIT)
    while patience.stuck():
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("command", "workers"), [(ttt, 0), (ttt, 2), (features, 0), (features, 1), (eft, 0), (fft, 0), (fft, 1)]
)
@pytest.mark.usefixtures("tiny", "hanging")
def test_a_picture_that_hangs_is_recorded_and_the_run_goes_on(
    command: Commands, workers: int, specks: Path, tmp_path: Path
) -> None:
    summary = command(specks, tmp_path / "out", {"workers": workers, "timeout": LIMIT})
    records = lines(tmp_path / "out")
    unreadable = [record for record in records if record["status"] == "unreadable"]
    assert {(record["id"], record["error"]) for record in unreadable} == {("cat/0.png", REASON)}
    assert {record["id"] for record in records} == {"cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"}
    assert summary["unreadable"] >= 1


@pytest.mark.usefixtures("tiny")
def test_a_disk_that_does_not_answer_ends_the_run(
    hanging: set[str], monkeypatch: pytest.MonkeyPatch, specks: Path, tmp_path: Path
) -> None:
    hanging.add("png")
    monkeypatch.setattr(patience, "MOST_STUCK", 2)
    run = {"timeout": 0.05}
    with pytest.raises(TimeoutError, match="3 pictures hang at the same time"):
        run_ttt(ttt_options(specks, tmp_path / "out", run=run))
    assert [record["status"] for record in lines(tmp_path / "out")] == ["unreadable", "unreadable"]
    # What hung is not tried again, and the rest is done when the disk answers.
    hanging.clear()
    run_ttt(ttt_options(specks, tmp_path / "out", run=run))
    assert sorted(record["status"] for record in lines(tmp_path / "out")) == ["ok", "ok", "unreadable", "unreadable"]
