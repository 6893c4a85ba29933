"""Every command, cut off at every one of its writes and started again, ends with the same files and numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rada_fast import _env
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.config.options import RunOptions
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.system import files

Run = Callable[[Path], dict[str, Any]]


Write = Callable[..., None]
Hook = Callable[[Path, Write, Callable[[], None]], None]
"""Called in place of a write with its path, the write, and what leaves behind what is there in its middle."""


def half_a_file(path: Path) -> None:
    path.with_name(f".{path.name}.1-0123abcd.partial").write_bytes(b"half")


def half_a_line(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"id": "ca')


@contextmanager
def every_write_through(hook: Hook) -> Iterator[None]:
    """Each way to write, and the renamings inside of them, goes through a hook."""

    def hooked(write: Write, leave_half: Callable[[Path], None]) -> Write:
        def through(path: Path, *args: Any, **more: Any) -> None:
            if _env.cache_dir() in path.parents:
                write(path, *args, **more)  # no result; what is there depends on the tests before
            else:
                hook(path, lambda: write(path, *args, **more), lambda: leave_half(path))

        return through

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write_whole", hooked(files._write_whole, half_a_file))
        patch.setattr(files, "append_line", hooked(files.append_line, half_a_line))
        patch.setattr(files, "rename", hooked(files.rename, lambda path: None))
        patch.setattr(files, "remove", hooked(files.remove, lambda path: None))
        yield


def ttt(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        options = RunOptions(output=str(output))
        config = TTTOptions(data=f"imagefolder:{data}", views=2, episode=EpisodeConfig(steps=1), run=options)
        return run_ttt(config)

    return run


def eft(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        spec, options = f"imagefolder:{data}", RunOptions(output=str(output))
        return run_eft(EFTOptions(train=spec, test=spec, epochs=3, batch_size=1, train_views="crop", run=options))

    return run


def fft(data: Path) -> Run:
    def run(output: Path) -> dict[str, Any]:
        spec, options = f"imagefolder:{data}", RunOptions(output=str(output))
        return run_fft(
            FFTOptions(
                train=spec, test=(spec,), epochs=2, finetune_from=1, finetune_epochs=2, batch_size=3,
                finetune_lr=1e-2, run=options,
            )
        )  # fmt: skip

    return run


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run."""
    left_out = {"time", "seconds", "images_per_second", "resumed", "peak_memory", "output", "config", "run", "warnings"}
    return {name: value for name, value in record.items() if name not in left_out}


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves: lines without times, the summary's numbers, weights as they are."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".jsonl":
            lines = [numbers(json.loads(line)) for line in path.read_text().splitlines()]
            found[path.name] = sorted(lines, key=str) if path.name == "images.jsonl" else lines
        elif path.suffix == ".safetensors":
            # Not the file's bytes: safetensors writes the header's entries in any order.
            found[path.name] = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        elif path.name == "summary.json":
            found[path.name] = numbers(json.loads(path.read_text()))
        else:
            found[path.name] = None
    return found


@pytest.mark.parametrize("command", [ttt, eft, fft])
@pytest.mark.usefixtures("tiny")
def test_a_run_killed_at_any_write_goes_on_to_the_same_results(
    command: Callable[[Path], Run], specks: Path, tmp_path: Path
) -> None:
    """What a killed process leaves is the folder as it is then: a copy before, within and after every write."""
    run, output = command(specks), tmp_path / "whole"
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
    whole = results(output)
    assert len(copies) > 8
    for killed in copies:
        run(killed)
        went_on = results(killed)
        assert {name for name in went_on.keys() | whole.keys() if went_on.get(name) != whole.get(name)} == set(), killed


@pytest.mark.parametrize("command", [ttt, eft, fft])
@pytest.mark.usefixtures("tiny")
def test_a_run_on_a_full_disk_goes_on_to_the_same_results(
    command: Callable[[Path], Run], specks: Path, tmp_path: Path
) -> None:
    run, seen, full = command(specks), 0, -1

    def fill(path: Path, write: Write, leave_half: Callable[[], None]) -> None:
        nonlocal seen
        seen += 1
        if seen == full:
            raise OSError(28, "No space left on device")
        write()

    with every_write_through(fill):
        run(tmp_path / "whole")
    whole, writes = results(tmp_path / "whole"), seen
    for full in range(2, writes + 1, 7):
        output, seen = tmp_path / str(full), 0
        with every_write_through(fill), pytest.raises(OSError, match="No space left"):
            run(output)
        run(output)
        assert results(output) == whole


@pytest.mark.parametrize("damaged", ["rada.pt", "rada-ft.pt"])
@pytest.mark.usefixtures("tiny")
def test_fft_with_a_damaged_state_comes_to_the_same_weights(specks: Path, tmp_path: Path, damaged: str) -> None:
    run, folder = fft(specks), tmp_path / "run"
    run(folder)
    whole = results(folder)
    (folder / "summary.json").unlink()
    (folder / damaged).write_bytes((folder / damaged).read_bytes()[:999])
    run(folder)
    again = results(folder)
    assert again.pop(f"{damaged}.damaged", "") is None
    assert again == whole
