"""Every damaged picture among many is recorded or named, none is lost, and the exit status says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from rada_fast import cli
from rada_fast.data import decode
from rada_fast.data.stored import Location
from tests.damage import DAMAGE, REPLACED, write_pictures

from .support import lines


@pytest.mark.parametrize("command", ["ttt", "features", "predict"])
@pytest.mark.usefixtures("tiny")
def test_all_damaged_pictures_are_recorded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_pictures(tmp_path / "data", 120)
    damaged = {paths[3 + 5 * number]: name for number, name in enumerate({**DAMAGE, **REPLACED})}
    for path, name in damaged.items():
        {**DAMAGE, **REPLACED}[name](path)
    gone, read = paths[0], decode._read_image

    def read_after_removal(place: Location) -> object:
        if place == paths[1]:
            gone.unlink(missing_ok=True)
        if place == gone:
            gone.unlink(missing_ok=True)
        return read(place)

    monkeypatch.setattr(decode, "_read_image", read_after_removal)
    options = ["--views", "2"] if command == "ttt" else []
    output = tmp_path / "out"
    run = ["--output", str(output), "--allow-chance"]
    assert cli.main([command, "--data", f"imagefolder:{tmp_path / 'data'}", *options, *run]) == 3
    printed = capsys.readouterr().err
    records = lines(output, "predictions.jsonl" if command == "predict" else "images.jsonl")
    by_id = {record["id"]: record["status"] for record in records}
    assert len(by_id) == len(records)
    ids = {path: path.relative_to(tmp_path / "data").as_posix() for path in paths}
    contents = [path for path, name in damaged.items() if name in DAMAGE]
    assert {by_id[ids[path]] for path in [gone, *contents]} == {"unreadable"}
    # What is no file is recorded as well, or skipped with a line that counts it.
    skipped = [path for path in paths if ids[path] not in by_id]
    assert {damaged[path] for path in skipped} <= REPLACED.keys()
    assert not skipped or f"{len(skipped)} entries were skipped" in printed
    sound = [path for path in paths if path not in damaged and path != gone]
    assert {by_id[ids[path]] for path in sound} == {"ok"}
    unreadable = sum(status == "unreadable" for status in by_id.values())
    assert f"rada-fast: {unreadable} images could not be read" in printed
