"""A disk that fails ends a run with one line; what was written stays valid, and the same command goes on later."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rada_fast import cli
from rada_fast.runs.folder import RunFolder
from rada_fast.system import files
from tests.loops.support import features_file, results, text_file

Fault = Callable[[], None]


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the status of a command, and the one line that it has printed about a failure."""
    status = cli.main(command)
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rada-fast: ")]
    return status, printed[-1] if printed else ""


@pytest.fixture(params=["ttt", "eft"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Return a command on features, which takes no model and no time."""
    text = ["--text-features", text_file(tmp_path / "t.npz"), "--logit-scale", "20"]
    if request.param == "ttt":
        return ["ttt", "--data", features_file(tmp_path / "f.npz", each=4, views=3), *text, "--num-heads", "2"]
    data = features_file(tmp_path / "f.npz", each=4)
    training = ["--train", data, "--test", data, "--protocol", "all", "--epochs", "3", "--save-every", "5steps"]
    return ["eft", *training, *text, "--num-heads", "2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting needs the rights of root")
    yield disk
    while not subprocess.run(["umount", "-l", disk], check=False, capture_output=True).returncode:
        pass


def after_some_writes(fault: Fault, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Let a fault happen before a line or a state of a run is written."""
    count = 0

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def counting(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == write:
                fault()
            original(*args, **kwargs)

        return counting

    for name in ("append", "save_state"):
        monkeypatch.setattr(RunFolder, name, counted(getattr(RunFolder, name)))


def fill(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def refuse_writing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse as a file system does that turns read-only; the mount command refuses that while the lock is open."""
    usual = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if disk in path.parents and mode[0] in "wa":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return usual(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize(
    ("break_disk", "reason"),
    [(fill, "[Errno 28] No space left on device: "), (refuse_writing, "[Errno 30] Read-only file system: ")],
)
def test_a_disk_that_takes_no_more_ends_a_run_and_loses_nothing(
    break_disk: Callable[[Path, pytest.MonkeyPatch], None],
    reason: str,
    command: list[str],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([*command, "--output", str(tmp_path / "complete")], capsys)[0] == 0
    output = small_disk / "run"
    with monkeypatch.context() as patch:
        after_some_writes(lambda: break_disk(small_disk, patch), patch, write=3)
        status, line = run([*command, "--output", str(output)], capsys)
    assert status == 1
    assert line.startswith(f"rada-fast: {reason}'{output}/")
    assert f"; to go on: rada-fast {command[0]} " in line
    (small_disk / "other").unlink(missing_ok=True)
    assert run([*command, "--output", str(output)], capsys)[0] == 0
    assert results(output) == results(tmp_path / "complete")


def unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "unmounted"])
def test_a_folder_that_has_gone_is_not_made_anew(
    removed: bool,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = tmp_path / "disk"
    (disk / "run").mkdir(parents=True)  # where nothing is mounted, the run's folder seems to be there, too
    if not removed:
        request.getfixturevalue("small_disk")
    after_some_writes(lambda: shutil.rmtree(disk / "run") if removed else unmount(disk), monkeypatch, write=2)
    status, line = run([*command, "--output", str(disk / "run")], capsys)
    assert status == 1
    assert str(disk / "run") in line
    assert ("was removed, moved or unmounted" in line) or "No such file or directory" in line
    assert removed or list((disk / "run").iterdir()) == []
    assert not removed or not (disk / "run").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.ESTALE, errno.EROFS])
def test_every_fault_of_a_write_names_the_file_and_leaves_it_as_it_was(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is that of fsync, in which a network file system reports what it could not write."""
    path = tmp_path / "a.json"
    files.write_text(path, "before")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=rf"\[Errno {code}\] .*: '.*/a.json'"):
        files.write_text(path, "after")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
