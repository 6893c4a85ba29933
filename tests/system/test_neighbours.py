"""Runs on the same device know of each other while their processes live, and of no run that has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rada_fast import UserError, _env
from rada_fast.system import neighbours

PROGRAM = """
import sys
from rada_fast import _env
from rada_fast.system import neighbours
_env.usable_cores = lambda: [0, 1, 2, 3]
neighbours.announce(sys.argv[1], "results/first")
print("here", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_env, "usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(neighbours, "_descriptors", {})
    yield
    neighbours.leave()


def other(device: str = "cpu") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, device], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_a_run_is_known_until_its_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with other() as process:
        (found,) = neighbours.announce("cpu", "results/second")
        assert (found.process, found.output) == (process.pid, "results/first")
        assert neighbours.announce("cuda:0", "results/second") == []
        assert neighbours.advice([found], "cpu") == (
            f"another run of yours (process {process.pid}, results/first) uses the same 4 cores: each takes longer; to "
            "divide the cores, start one run with 'taskset -c 2-3' and the other with 'taskset -c 0-1'"
        )
        with pytest.raises(UserError, match=r"exclusive: another run of yours .* uses the cores already"):
            neighbours.announce("cpu", "results/second", exclusive=True)
        monkeypatch.setattr(_env, "usable_cores", lambda: [6, 7])
        assert neighbours.announce("cpu", "results/second", exclusive=True) == []
        monkeypatch.undo()
        monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path))
        process.kill()
    assert neighbours.announce("cpu", "results/second", exclusive=True) == []
    left = sorted(path.name for path in (tmp_path / "running").glob("*.json"))
    assert all(f"-{os.getpid()}-" in name for name in left)


def test_a_run_that_has_ended_is_not_known_although_its_process_goes_on() -> None:
    code = (
        "from rada_fast.system import neighbours\n"
        "neighbours._env.usable_cores = lambda: [0]\n"
        "print(len(neighbours.announce('cpu', 'results/second')))"
    )

    def seen_by_another() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    neighbours.announce("cpu", "results/first")
    assert seen_by_another() == "1\n"
    neighbours.leave()
    assert seen_by_another() == "0\n"
    neighbours.announce("cpu", "results/third")
    assert seen_by_another() == "1\n"
    neighbours.leave()


def test_two_runs_on_one_gpu_are_told(tmp_path: Path) -> None:
    with other("cuda:1") as process:
        assert neighbours.announce("cpu", "x") == neighbours.announce("cuda:0", "x") == []
        (found,) = neighbours.announce("cuda:1", "x")
        assert neighbours.advice([found], "cuda:1").endswith(
            "uses cuda:1 too: both take longer; give --device to use another one"
        )
        process.kill()


def test_where_the_cache_cannot_be_written_nobody_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "running").write_text("a file")
    assert neighbours.announce("cpu", "x", exclusive=True) == []
