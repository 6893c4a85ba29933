"""Every command that is interrupted at any of its writes and started again ends with the same files and numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rada_fast import _env
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.system import files

from .support import eft_options, fft_options, results, ttt_options

Run = Callable[[Path], dict[str, Any]]
Write = Callable[..., None]
Hook = Callable[[Path, Write, Callable[[], None]], None]
"""A Hook is called instead of a write, with its path, the write, and a function that leaves the write half done."""


def half_a_file(path: Path) -> None:
    path.with_name(f".{path.name}.1-0123abcd.partial").write_bytes(b"half")


def half_a_line(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"id": "ca')


@contextmanager
def every_write_through(hook: Hook) -> Iterator[None]:
    """Send every write, and every renaming and removal, through a hook."""

    def hooked(write: Write, leave_half: Callable[[Path], None]) -> Write:
        def write_through_hook(path: Path, *args: Any, **kwargs: Any) -> None:
            if _env.cache_dir() in path.parents:
                write(path, *args, **kwargs)  # the cache is no result, and earlier tests may have filled it
            else:
                hook(path, lambda: write(path, *args, **kwargs), lambda: leave_half(path))

        return write_through_hook

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write_whole", hooked(files._write_whole, half_a_file))
        patch.setattr(files, "append_line", hooked(files.append_line, half_a_line))
        patch.setattr(files, "rename", hooked(files.rename, lambda path: None))
        patch.setattr(files, "remove", hooked(files.remove, lambda path: None))
        yield


def ttt(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        return run_ttt(ttt_options(data, output))

    return run


def eft(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        return run_eft(eft_options(data, data, output, epochs=3, train_views="crop", save_every="2steps"))

    return run


def fft(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        changes: dict[str, Any] = {"epochs": 2, "finetune_epochs": 2, "batch_size": 3, "finetune_lr": 1e-2}
        return run_fft(fft_options(data, data, output, save_every="1step", **changes))

    return run


@pytest.mark.parametrize("command", [ttt, eft, fft])
@pytest.mark.usefixtures("tiny")
def test_a_run_killed_at_any_write_goes_on_to_the_same_results(
    command: Callable[[Path], Run], specks: Path, tmp_path: Path
) -> None:
    """A copy before, within and after every write is the folder that a process leaves that is killed there."""
    run, output = command(specks), tmp_path / "complete"
    copies: list[Path] = []

    def copy() -> None:
        copies.append(tmp_path / f"killed {len(copies)}")
        shutil.copytree(output, copies[-1])

    def copy_around(path: Path, write: Write, leave_half: Callable[[], None]) -> None:
        before = {entry: entry.read_bytes() for entry in output.iterdir()}
        leave_half()
        copy()
        for entry in set(output.iterdir()) - before.keys():
            entry.unlink()
        if path in before:
            path.write_bytes(before[path])
        write()

    with every_write_through(copy_around):
        run(output)
    copy()
    complete = results(output)
    assert len(copies) > 8
    for killed in copies:
        run(killed)
        resumed = results(killed)
        names = resumed.keys() | complete.keys()
        assert {name for name in names if resumed.get(name) != complete.get(name)} == set(), killed


@pytest.mark.parametrize("command", [ttt, eft, fft])
@pytest.mark.usefixtures("tiny")
def test_a_run_on_a_full_disk_goes_on_to_the_same_results(
    command: Callable[[Path], Run], specks: Path, tmp_path: Path
) -> None:
    run, writes_so_far, full = command(specks), 0, -1

    def fill(path: Path, write: Write, leave_half: Callable[[], None]) -> None:
        nonlocal writes_so_far
        writes_so_far += 1
        if writes_so_far == full:
            raise OSError(28, "No space left on device")
        write()

    with every_write_through(fill):
        run(tmp_path / "complete")
    complete, writes = results(tmp_path / "complete"), writes_so_far
    for full in range(2, writes + 1, 7):
        output, writes_so_far = tmp_path / str(full), 0
        with every_write_through(fill), pytest.raises(OSError, match="No space left"):
            run(output)
        run(output)
        assert results(output) == complete


@pytest.mark.parametrize("damaged", ["rada.pt", "rada-ft.pt"])
@pytest.mark.usefixtures("tiny")
def test_fft_with_a_damaged_state_comes_to_the_same_weights(specks: Path, tmp_path: Path, damaged: str) -> None:
    run, folder = fft(specks), tmp_path / "run"
    run(folder)
    complete = results(folder)
    (folder / "summary.json").unlink()
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:999])
    run(folder)
    again = results(folder)
    assert again.pop(f"{damaged}.damaged", "") is None
    assert again == complete


def test_a_finished_run_says_where_it_was_moved_to(specks: Path, tmp_path: Path) -> None:
    run_ttt(ttt_options(specks, tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert run_ttt(ttt_options(specks, tmp_path / "there"))["output"] == str(tmp_path / "there")


def test_a_run_killed_behind_its_summary_leaves_no_progress(specks: Path, tmp_path: Path) -> None:
    run_ttt(ttt_options(specks, tmp_path / "run"))
    (tmp_path / "run" / "progress.json").write_text("{}")
    run_ttt(ttt_options(specks, tmp_path / "run"))
    assert not (tmp_path / "run" / "progress.json").exists()
