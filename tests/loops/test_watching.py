"""A run tells how it stands while it goes on, and after it was cut off its folder says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rada_fast.loops import training
from rada_fast.loops.eft import run_eft
from rada_fast.loops.ttt import run_ttt
from rada_fast.reports.status import FINISHED, INTERRUPTED, RUNNING, Watched
from rada_fast.runs import heartbeat, progress
from rada_fast.system import files

from .support import eft_options, ttt_options


@pytest.mark.usefixtures("tiny")
def test_a_run_is_watched_until_it_is_cut_off_and_after(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, found = tmp_path / "out", []
    watched, append = Watched(output), files.append_line

    def look_and_end(path: Path, line: str) -> None:
        if len(found) == 2:
            raise KeyboardInterrupt
        append(path, line)
        found.append(watched.look())

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_line", look_and_end)
        with pytest.raises(KeyboardInterrupt):
            run_ttt(ttt_options(specks, output))
    assert [(one.state, one.images, one.images_in_all) for one in found] == [(RUNNING, 1, 4), (RUNNING, 2, 4)]
    cut = watched.look()
    assert (cut.state, cut.images, cut.images_in_all, cut.title) == (INTERRUPTED, 2, 4, "test-time training")
    run_ttt(ttt_options(specks, output))
    ended = watched.look()
    assert (ended.state, ended.images, ended.images_in_all) == (FINISHED, 4, 4)
    summary = json.loads((output / "summary.json").read_text())
    assert ended.accuracy[""]["adapted"] == summary["adapted_top1"]


@pytest.mark.usefixtures("tiny")
def test_a_training_tells_its_loss_inside_of_an_epoch(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "NOTE_INTERVAL", 0.0)
    for name in ("PLAIN_INTERVAL", "FIRST_LINE"):
        monkeypatch.setattr(progress, name, 0.0)
    run_eft(eft_options(specks, specks, tmp_path / "out", protocol="all"))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficient fine-tuning: ")]
    records = [json.loads(line) for line in (tmp_path / "out" / "epochs.jsonl").read_text().splitlines()]
    assert told[0].startswith("efficient fine-tuning: 1/8, 7 left")
    first: Mapping[str, Any] = records[0]
    # After the last step of an epoch, the loss so far is that of the epoch.
    assert f"loss so far {first['loss']:.4f}, right {first['train_top1']:.1f} %" in told[3]
