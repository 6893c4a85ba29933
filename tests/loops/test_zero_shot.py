"""A run whose zero-shot answers are no better than guesses stops before it begins, unless it is told to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import ClassOptions, RunOptions
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.system import notices
from tests.loops.support import features_file, text_file

RUNS = {
    "ttt": (run_ttt, lambda data, **rest: TTTOptions(data=data, episode=EpisodeConfig(steps=1), **rest)),
    "eft": (run_eft, lambda data, **rest: EFTOptions(train=data, test=data, epochs=1, protocol="all", **rest)),
    "fft": (
        run_fft,
        lambda data, **rest: FFTOptions(train=data, test=(data,), epochs=1, finetune_from=1, stages="first", **rest),
    ),
}


def start(command: str, folder: Path, data: str, text: str, **run: Any) -> dict[str, Any]:
    function, options = RUNS[command]
    made = options(data, text=ClassOptions(text_features=text), run=RunOptions(output=str(folder / "out"), **run))
    with notices.collecting():
        return function(made)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("command", RUNS)
def test_wrong_labels_stop_a_run_before_it_begins(command: str, tmp_path: Path) -> None:
    data = features_file(tmp_path / "data.npz", each=24, label_shift=1)
    text = text_file(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"120 zero-shot answers are right.*the labels begin with 1, the names with 0"):
        start(command, tmp_path, data, text)
    assert not (tmp_path / "out" / "images.jsonl").exists()
    summary = start(command, tmp_path, data, text, allow_chance=True)
    assert any("zero-shot answers are right" in warning for warning in summary["warnings"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["command"] == command


@pytest.mark.parametrize("command", RUNS)
def test_right_labels_do_not_stop_a_run(command: str, tmp_path: Path) -> None:
    data = features_file(tmp_path / "data.npz", each=24)
    summary = start(command, tmp_path, data, text_file(tmp_path / "text.npz"))
    assert not any("zero-shot" in warning for warning in summary["warnings"])
