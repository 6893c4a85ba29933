"""A trace of a few steps lies in the folder of a run that asked for one, and the results are those without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.system import notices

from .conftest import SIZE
from .support import eft_options, fft_options, lines, ttt_options


def check_trace(folder: Path, prefix: str = "") -> None:
    with gzip.open(folder / f"{prefix}trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}
    assert len(steps) == 5
    table = (folder / f"{prefix}trace.txt").read_text()
    assert "Self CPU %" in table
    assert "aten::" in table


@pytest.fixture
def many(specks: Path) -> Path:
    """Add pictures to specks, so that there are more steps than are traced."""
    for index in range(2, 8):
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(specks / "cat" / f"{index}.png")
    return specks


@pytest.mark.usefixtures("tiny")
def test_groups_of_test_time_training_are_traced(many: Path, tmp_path: Path) -> None:
    run_ttt(ttt_options(many, tmp_path / "plain", episodes=1))
    run_ttt(ttt_options(many, tmp_path / "traced", episodes=1, run={"profile": True}))
    check_trace(tmp_path / "traced")
    assert lines(tmp_path / "traced") == lines(tmp_path / "plain")
    # The files belong to the run, which may be overwritten with them.
    run_ttt(ttt_options(many, tmp_path / "traced", episodes=1, run={"overwrite": True, "seed": 3}))


@pytest.mark.usefixtures("tiny")
def test_steps_of_a_training_are_traced(many: Path, tmp_path: Path) -> None:
    run_eft(eft_options(many, many, tmp_path / "eft", run={"profile": True}))
    check_trace(tmp_path / "eft")
    run_fft(fft_options(many, many, tmp_path / "fft", batch_size=1, run={"profile": True}))
    for stage in ("rada", "rada-ft"):
        check_trace(tmp_path / "fft", f"{stage}-")


@pytest.mark.usefixtures("tiny")
def test_a_run_without_enough_steps_says_so(specks: Path, tmp_path: Path) -> None:
    run_fft(fft_options(specks, specks, tmp_path / "out", batch_size=2, run={"profile": True}))
    assert not list((tmp_path / "out").glob("*trace*"))
    assert notices.so_far() == [
        "profile: there is no trace, because the run had no more than 3 steps to do, and the first 3 only warm up"
    ]
