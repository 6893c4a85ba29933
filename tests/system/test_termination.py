"""A signal ends a command with one line and a status; finished results stay, and the same command goes on."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rada_fast import cli
from rada_fast.config.options import RunOptions
from rada_fast.engine.episodes import Adaptation
from rada_fast.runs.folder import RunFolder
from rada_fast.system import files, termination
from rada_fast.system.termination import Terminated, deferred, postponed, raise_if_asked, raising_terminated


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """Handle signals as in a terminal; a program in the background, or under nohup, ignores some of them."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status", "reason"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]
)
def test_a_terminated_command_says_how_to_go_on(
    number: int,
    status: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    np.savez(tmp_path / "f.npz", features=features, labels=np.arange(6) % 2)
    np.savez(tmp_path / "t.npz", features=features[:2], labels=np.arange(2))
    command = ["ttt", "--data", f"features:{tmp_path / 'f.npz'}", "--text-features", f"features:{tmp_path / 't.npz'}"]
    command += ["--output", str(tmp_path / "run"), "--episodes", "2"]
    original, calls = Adaptation.__call__, 0

    def terminate(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        return original(*args, **more)

    monkeypatch.setattr(Adaptation, "__call__", terminate)
    assert cli.main(command) == status
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"rada-fast: {reason}; to go on: {shlex.join(['rada-fast', *command])}"
    )
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 2
    assert signal.getsignal(number) is signal.SIG_DFL
    assert cli.main(command) == 0
    assert len((tmp_path / "run" / "images.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_during_a_save_is_not_an_error_of_the_save(
    tmp_path: Path, number: int, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save turns whatever is raised while it writes into an error of its own."""
    write = files._ErrorRecorder.write

    def signalled(recorder: files._ErrorRecorder, data: Any) -> int:
        monkeypatch.undo()
        os.kill(os.getpid(), number)
        return write(recorder, data)

    monkeypatch.setattr(files._ErrorRecorder, "write", signalled)
    state = {"a": torch.zeros(9)}
    with pytest.raises(KeyboardInterrupt) as caught, raising_terminated():
        files.write_state(tmp_path / "state.pt", state, previous=tmp_path / "state-previous.pt")
    assert type(caught.value) is raised
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with raising_terminated():
        raise_if_asked()  # the signal was for the earlier command


def test_a_signal_that_a_library_drops_is_raised_at_the_next_write(tmp_path: Path) -> None:
    def load(state: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def drop(state: Any) -> None:
        try:
            load(state)
        except Terminated:
            raise ValueError("damaged") from None

    def drop_and_append(folder: RunFolder) -> None:
        with suppress(Terminated):
            load(None)
        folder.append("images.jsonl", {"id": "a"})

    options, identity = RunOptions(output=str(tmp_path / "run")), {"command": "eft"}
    with RunFolder(options, identity) as folder:
        folder.save_state("state.pt", {"a": 1})
        with pytest.raises(Terminated), raising_terminated():
            folder.load_state("state.pt", drop)
        assert (folder.path / "state.pt").exists()
        with pytest.raises(Terminated), raising_terminated():
            drop_and_append(folder)
        assert folder.read_lines("images.jsonl") == []


def test_only_the_first_signal_is_caught() -> None:
    def check_the_handler() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    with pytest.raises(Terminated), raising_terminated():
        check_the_handler()


def test_another_handler_of_the_signal_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_deferred_signal_is_raised_at_the_end(number: int, raised: type[BaseException]) -> None:
    def defer() -> None:
        with deferred():
            os.kill(os.getpid(), number)
            done.append(number)

    done: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(raised), raising_terminated():
        defer()
    assert done == [number]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_is_not_deferred() -> None:
    def defer() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(True)

    done: list[bool] = []
    with pytest.raises(Terminated), raising_terminated():
        defer()
    assert not done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_is_finished_first_but_not_after_a_second_signal_or_too_long(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def work(name: str, signals: int, seconds: float = 0.0) -> None:
        with postponed():
            for _ in range(signals):
                os.kill(os.getpid(), number)
            time.sleep(seconds)
            done.append(name)

    with pytest.raises(KeyboardInterrupt), raising_terminated():
        work("finished", 1)
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt), raising_terminated():
            work("interrupted twice", 2)
    monkeypatch.setattr(termination, "GRACE", 0.05)
    with pytest.raises(KeyboardInterrupt), raising_terminated():
        work("too long", 1, seconds=10)
    assert done == ["finished"]
