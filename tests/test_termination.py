"""SIGTERM ends a command with one line and status 143; what was finished stays, and the same command goes on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rada_fast import cli
from rada_fast.loops import test_time
from rada_fast.termination import Terminated, raising_terminated


def test_a_terminated_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    features = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    np.savez(tmp_path / "f.npz", features=features, labels=np.arange(6) % 2)
    np.savez(tmp_path / "t.npz", features=features[:2], labels=np.arange(2))
    command = ["ttt", "--data", f"features:{tmp_path / 'f.npz'}", "--text-features", f"features:{tmp_path / 't.npz'}"]
    command += ["--output", str(tmp_path / "run"), "--episodes", "2"]
    original, calls = test_time.adapt_episodes, 0

    def terminate(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    monkeypatch.setattr(test_time, "adapt_episodes", terminate)
    assert cli.main(command) == 143
    assert capsys.readouterr().err.splitlines()[-1] == ("rada-fast: terminated; start the same command again to go on")
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert cli.main(command) == 0
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 6


def test_only_the_first_signal_is_caught() -> None:
    def look_after_the_first() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with pytest.raises(Terminated), raising_terminated():
        look_after_the_first()


def test_another_answer_to_the_signal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with raising_terminated():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)

    def in_a_thread() -> None:
        with raising_terminated():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[Any] = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [before]
