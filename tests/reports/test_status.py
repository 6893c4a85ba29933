"""The state of a run is read from its folder, whatever the run does at that moment, and nothing there changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rada_fast.config.tools import StatusOptions
from rada_fast.errors import UserError
from rada_fast.reports import watching
from rada_fast.reports.status import DAMAGED, FINISHED, INTERRUPTED, RUNNING, Watched
from rada_fast.reports.watching import line_about, notes_of, run_status

HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on {os.uname().nodename}\\n")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def line(id: str, label: int | None = 1, answer: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": id, "label": label, "status": "ok", "zero_shot": [0, 1], "adapted": [answer, 0], **more}


def append(folder: Path, *records: dict[str, Any], name: str = "images.jsonl") -> None:
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def begin(folder: Path, command: str = "ttt", images: int = 10, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    inputs = {"data": {f"{number}.png": "stamp" for number in range(images)}}
    identity = {"command": command, "options": {"run": {}, **options}}
    (folder / "run.json").write_text(json.dumps({"format": "rada_fast.run.v1", "identity": identity, "inputs": inputs}))
    return folder


def beat(folder: Path, name: str = "progress.json", **content: Any) -> None:
    known = {"format": "rada_fast.progress.v1", "updated": time.time(), "title": "test-time training", "unit": "images"}
    values = {"done": 2, "total": 8, "earlier": 2, "per_second": 1.0, "recent_per_second": 2.0, "seconds_left": 3.0}
    (folder / name).write_text(json.dumps(known | values | content))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a run whose lock another process holds."""
    folder = begin(tmp_path / "held")
    lock = folder / "run.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield folder
        process.kill()


def test_a_running_run_is_followed_line_by_line(held: Path) -> None:
    watched = Watched(held)
    append(held, line("0.png"), line("1.png", answer=0), {"format": "a header"})
    beat(held, warnings=["odd"], memory={"process_mib": 5.0}, command="rada-fast ttt")
    with (held / "images.jsonl").open("a") as file:
        file.write(json.dumps(line("2.png"))[:30])
    found = watched.look()
    assert (found.state, found.images, found.images_in_all) == (RUNNING, 2, 10)
    assert found.accuracy == {"": {"zero-shot": 0.0, "adapted": 50.0}}
    assert (found.recent_per_second, found.seconds_left, found.warnings) == (2.0, 3.0, ("odd",))
    assert found.owners[0].host == os.uname().nodename
    assert found.resume is None
    with (held / "images.jsonl").open("a") as file:
        file.write(json.dumps(line("2.png"))[30:] + "\n")
    unreadable = {"id": "3.png", "label": 0, "status": "unreadable", "error": "x"}
    append(held, line("0.png"), unreadable, line("4.png", None, status="diverged"))
    found = watched.look()
    assert (found.images, found.unreadable, found.diverged) == (5, 1, 1)
    assert found.accuracy == {"": {"zero-shot": 0.0, "adapted": 50.0}}


def test_a_look_never_takes_the_lock_and_changes_nothing(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the lock was touched")

    monkeypatch.setattr("fcntl.flock", refuse)
    append(held, line("0.png"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in held.iterdir()}
    assert Watched(held).look().state == RUNNING
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in held.iterdir()} == before


def test_lines_that_are_written_anew_count_anew(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    append(folder, line("0.png"), line("1.png"))
    watched = Watched(folder)
    assert watched.look().images == 2
    (folder / "images.jsonl").unlink()
    assert watched.look().images == 0
    append(folder, line("5.png"))
    assert watched.look().images == 1


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    (folder / "run.lock").write_text(f"process 999999999 on {os.uname().nodename}\n")
    append(folder, line("0.png"))
    beat(folder, command="rada-fast ttt --data imagefolder:x", total=None)
    found = Watched(folder).look()
    assert (found.state, found.resume) == (INTERRUPTED, "rada-fast ttt --data imagefolder:x")
    assert notes_of(found) == ["to go on: rada-fast ttt --data imagefolder:x"]
    assert found.images_in_all == 10  # as run.json lists them
    for directory, start in ((str(Path.cwd()), ""), ("/where it was", "cd '/where it was' && ")):
        beat(folder, command="rada-fast ttt --data imagefolder:x", directory=directory)
        assert Watched(folder).look().resume == f"{start}rada-fast ttt --data imagefolder:x"


def test_odd_values_in_the_files_of_a_run_are_left_out(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", "fft", method={}, epochs=10**400)
    beat(folder, title=float("nan"), done=10**400, total=-(10**400), directory=3, memory=[], warnings={}, updated="now")
    append(folder, {"epoch": 1, "loss": 10**400, "stage": {}}, name="epochs.jsonl")
    found = Watched(folder).look()
    assert (found.state, found.epochs, found.epochs_in_all, found.loss) == (INTERRUPTED, 1, None, None)
    assert run_status(StatusOptions((str(folder),))) == 0


@pytest.mark.parametrize(("age", "state"), [(0.0, RUNNING), (1000.0, INTERRUPTED)])
def test_a_run_of_another_machine_is_judged_by_its_progress(tmp_path: Path, age: float, state: str) -> None:
    folder = begin(tmp_path / "run")
    (folder / "run.lock").write_text("process 1 on another.machine\n")
    beat(folder, updated=time.time() - age)
    assert Watched(folder).look().state == state


def test_the_lines_and_the_progress_of_several_processes_are_added(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", images=30)
    append(folder, line("0.png"))
    for rank in (0, 1):
        append(folder, line(f"{rank + 1}.png"), line("0.png"), name=f"images.rank-000{rank}.jsonl")
        beat(folder, f"progress.rank-000{rank}.json", total=9, earlier=1, memory={"process_mib": 5.0})
    append(folder, line("old.png"), name="images-superseded.jsonl")
    found = Watched(folder).look()
    assert (found.images, found.images_in_all, found.ranks) == (3, 19, 3)
    assert (found.done, found.total, found.per_second, found.memory) == (4, 18, 2.0, {"process_mib": 10.0})


def test_a_finished_run_is_told_by_its_summary(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run", "eft", epochs=2)
    (folder / "summary.json").write_text(json.dumps({"warnings": ["w"], "time": {"images_per_second": 7.0}}))
    append(folder, *(line(f"{n}.png", split="base") for n in range(3)), {"id": "0.png", "split": "train", "label": 0})
    append(folder, {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5, "train_top1": 80.0}, name="epochs.jsonl")
    found = Watched(folder).look()
    assert (found.state, found.epochs, found.epochs_in_all, found.loss) == (FINISHED, 2, 2, 1.5)
    assert (found.warnings, found.per_second) == (("w",), 7.0)
    assert found.accuracy == {"base": {"zero-shot": 0.0, "adapted": 100.0}}
    assert "loss 1.5000, 80.0 % of the training images right" in line_about(found)
    # It is started again for more images, and killed.
    beat(folder, updated=time.time() + 5)
    assert Watched(folder).look().state == INTERRUPTED


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "rada_fast.run.v1"}', "\0" * 100, "[" * 100_000])
def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path, content: str) -> None:
    folder = begin(tmp_path / "run")
    append(folder, line("0.png"), {"id": ["odd"], "label": {}, "status": 3, "zero_shot": 5})
    for name in ("run.json", "progress.json", "summary.json"):
        (folder / name).write_text(content)
    with (folder / "images.jsonl").open("a") as file:
        file.write("damaged\n" + content + "\n")
    found = Watched(folder).look()
    assert (found.state, found.fault) == (DAMAGED, "its run.json is damaged or missing")
    assert found.damaged_lines == 1 + (not content.startswith('{"'))
    assert run_status(StatusOptions((str(folder),))) == 2


def test_foreign_folders_are_refused_and_others_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not that of a run and holds none"):
        run_status(StatusOptions((str(tmp_path / "empty"),)))
    with pytest.raises(UserError, match="does not exist"):
        run_status(StatusOptions((str(tmp_path / "none"),)))
    begin(tmp_path / "both").joinpath("run.json").rename(tmp_path / "both" / "saved.json")
    begin(tmp_path / "both" / "one")
    append(begin(tmp_path / "both" / "two"), line("0.png"))
    assert run_status(StatusOptions((str(tmp_path / "empty"), str(tmp_path / "both")), json=True)) == 2
    printed = capsys.readouterr()
    assert [Path(one["folder"]).name for one in json.loads(printed.out)] == ["one", "two"]
    assert "empty is not that of a run" in printed.err


def test_a_run_is_followed_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin(tmp_path / "run")
    (folder / "run.lock").write_text("process 1 on another.machine\n")
    beat(folder)
    seconds = [0.0]

    def sleep(interval: float) -> None:
        seconds[0] += interval
        if seconds[0] == 130:
            (folder / "summary.json").write_text("{}")
            (folder / "progress.json").unlink()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    monkeypatch.setattr(watching.time, "monotonic", lambda: seconds[0])
    assert run_status(StatusOptions((str(folder),), follow=True)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [row.split(",")[0] for row in printed[-3:]] == [
        f"{folder}: running", f"{folder}: running", f"{folder}: finished"
    ]  # fmt: skip
