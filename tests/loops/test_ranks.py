"""Several processes give the results of a single one to the bit, and a group that was ended goes on with any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rada_fast.errors import UserError
from rada_fast.runs import lines
from rada_fast.runs.contents import name_of_rank, names_in
from rada_fast.runs.lock import FolderLock
from tests.loops.support import lines as records_in
from tests.pictures import write_class_folders
from tests.processes import Rank, command, run_ranks, start_ranks, wait_for

IMAGES = "images.jsonl"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 15 pictures of three classes, of which one cannot be read."""
    folder = write_class_folders(tmp_path_factory.mktemp("pictures"), ["cat", "dog", "fish"], each=5)
    (folder / "dog" / "1.png").write_bytes(b"no picture")
    return folder


def ttt(pictures: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a small ttt."""
    options = ["--views", "3", "--steps", "1", "--workers", "1", "--allow-unreadable", "1"]
    return ["ttt", "--data", f"imagefolder:{pictures}", "--output", str(output), *options, *more]


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without times, and without what says how the run was started."""
    varying = {"time", "resumed", "peak_memory", "output", "config"}
    return {name: value for name, value in summary.items() if name not in varying}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run ttt in a single process, and return its folder."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert command(ttt(pictures, folder)) == 0
    return folder


def same_results(folder: Path, alone: Path) -> None:
    """Check that a folder holds the same files as that of a single process, with the same numbers."""
    assert (folder / IMAGES).read_bytes() == (alone / IMAGES).read_bytes()
    assert numbers(summary_of(folder)) == numbers(summary_of(alone))
    assert names_in(folder) == names_in(alone)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_write_the_files_of_a_single_process(count: int, pictures: Path, alone: Path, tmp_path: Path) -> None:
    started = run_ranks(count, tmp_path / "log", command, ttt(pictures, tmp_path / "run"))
    same_results(tmp_path / "run", alone)
    time = summary_of(tmp_path / "run")["time"]
    assert (time["images"], time["processes"]) == (15, count)
    assert "rada-fast ttt" in started[0].output.read_text()
    assert [rank.output.read_text() for rank in started[1:]] == [""] * (count - 1)
    assert [rank.errors.read_text() for rank in started[1:]] == [""] * (count - 1)
    # The same command, with any number of processes, finds the run finished.
    again = run_ranks(5 - count, tmp_path / "again", command, ttt(pictures, tmp_path / "run"))
    assert "nothing was computed again" in again[0].errors.read_text()
    same_results(tmp_path / "run", alone)


@pytest.mark.parametrize("words", [["predict"], ["predict", "--ttt", "--views", "2", "--steps", "1"], ["eval"]])
def test_predict_and_eval_of_ranks_are_those_of_a_single_process(
    words: list[str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(folder: str) -> list[str]:
        data = ["--data", f"imagefolder:{pictures}", "--output", str(tmp_path / folder)]
        return [words[0], *data, "--allow-unreadable", "1", *words[1:]]

    assert command(arguments("alone")) == 0
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path / "cache"))  # or the ranks would not encode at all
    run_ranks(2, tmp_path / "log", command, arguments("ranks"))
    names = names_in(tmp_path / "alone")
    assert names_in(tmp_path / "ranks") == names
    for name in names:
        if name.endswith((".jsonl", ".csv")):
            assert (tmp_path / "ranks" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert numbers(summary_of(tmp_path / "ranks")) == numbers(summary_of(tmp_path / "alone"))


def test_torchrun_starts_the_command(pictures: Path, alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rada_fast"]
    done = subprocess.run(
        [*torchrun, *ttt(pictures, tmp_path / "run"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == summary_of(tmp_path / "run")
    assert "Warning" not in done.stderr
    same_results(tmp_path / "run", alone)


def interrupted(folder: Path, alone: Path, ranks: int) -> set[str]:
    """Leave the folder of a group that was killed: each rank has done a part, and one has written half a line."""
    folder.mkdir()
    (folder / "run.json").write_bytes((alone / "run.json").read_bytes())
    records = records_in(alone)
    lines.write(folder / IMAGES, records[:1])
    for rank in range(ranks):
        lines.write(folder / name_of_rank(IMAGES, rank), records[rank + 1 :: 5][:2])
        (folder / name_of_rank("run.lock", rank)).touch()
        (folder / name_of_rank("progress.json", rank)).touch()
    with (folder / name_of_rank(IMAGES, 0)).open("a") as file:
        file.write('{"id": "fish/')
    return {record["id"] for record in records[:1] + records[1::5][:2] + records[2::5][:2]}


@pytest.mark.parametrize("count", [1, 3])
def test_what_two_killed_ranks_have_done_is_kept_by_any_number(
    count: int, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    done = interrupted(tmp_path / "run", alone, 2)
    if count == 1:
        assert command(ttt(pictures, tmp_path / "run")) == 0
    else:
        run_ranks(count, tmp_path / "log", command, ttt(pictures, tmp_path / "run"))
    same_results(tmp_path / "run", alone)
    assert summary_of(tmp_path / "run")["resumed"] == len(done) == 5
    assert summary_of(tmp_path / "run")["time"]["images"] == 10


def slow(pictures: Path, output: Path) -> list[str]:
    """Return the arguments of a ttt that takes many seconds, but writes its first lines soon."""
    return ttt(pictures, output, "--steps", "1000", "--episodes", "1")


def wait_for_lines(started: list[Rank], output: Path) -> None:
    """Wait until every rank has written a line."""
    files = [output / name_of_rank(IMAGES, number) for number in range(len(started))]
    wait_for(lambda: all(file.is_file() and file.stat().st_size for file in files))


def test_a_killed_rank_ends_the_others_with_one_clear_line(pictures: Path, tmp_path: Path) -> None:
    started = start_ranks(2, tmp_path / "log", command, slow(pictures, tmp_path / "run"))
    wait_for_lines(started, tmp_path / "run")
    started[1].process.kill()
    assert started[1].wait() == -signal.SIGKILL
    started[0].process.terminate()  # as torchrun does with the ranks that are left
    assert started[0].wait() == 143
    last = started[0].errors.read_text().splitlines()[-1]
    assert last.startswith("rada-fast: rank 1 of 2 was killed or has crashed; to go on: ")


def test_ranks_refuse_a_second_run_and_say_once_that_they_were_asked_to_end(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = start_ranks(2, tmp_path / "log", command, slow(pictures, tmp_path / "run"))
    wait_for_lines(started, tmp_path / "run")
    assert command(slow(pictures, tmp_path / "run")) == 2
    assert "is in use by another run" in capsys.readouterr().err
    with pytest.raises(UserError, match="is in use by another run"):
        FolderLock(tmp_path / "run" / "run.rank-0001.lock")
    before = {rank: (tmp_path / "run" / name_of_rank(IMAGES, rank)).read_text() for rank in range(2)}
    for rank in started:
        assert rank.process.pid is not None
        os.kill(rank.process.pid, signal.SIGTERM)
    assert [rank.wait() for rank in started] == [143, 143]
    said = "".join(rank.errors.read_text() for rank in started)
    assert said.count("rada-fast: terminated; to go on: ") == said.count("to go on: ") == 1
    for rank, text in before.items():
        assert (tmp_path / "run" / name_of_rank(IMAGES, rank)).read_text().startswith(text)


def test_a_refusal_is_printed_once_and_ends_all_ranks(pictures: Path, tmp_path: Path) -> None:
    wrong = ttt(pictures, tmp_path / "run", "--adapter", str(tmp_path / "no such file"))
    started = start_ranks(2, tmp_path / "log", command, wrong)
    assert [rank.wait() for rank in started] == [2, 2]
    said = [line for rank in started for line in rank.errors.read_text().splitlines()]
    assert len(said) == 1
    assert "--adapter" in said[0]
    started = start_ranks(2, tmp_path / "log2", command, ["doctor"])
    assert [rank.wait() for rank in started] == [2, 2]
    said = [line for rank in started for line in rank.errors.read_text().splitlines()]
    assert len(said) == 1
    assert "doctor runs in one process, start it without torchrun" in said[0]
