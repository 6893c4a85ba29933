"""A file is replaced only by one that the disk gives back as it was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rada_fast.system import files

WRITES: dict[str, Callable[[Path, float], None]] = {
    "text": lambda path, value: files.write_text(path, f"{value}\n" * 99),
    "tensors": lambda path, value: files.write_tensors(path, {"a": torch.full((99,), value)}),
    "state": lambda path, value: files.write_state(path, {"a": torch.full((99,), value)}, previous=path.parent / "b"),
}


@pytest.mark.parametrize("kind", list(WRITES))
def test_what_the_disk_has_not_kept_replaces_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is one that loses a bit when the file is brought to it."""
    write, path, fsync, brought = WRITES[kind], tmp_path / "a", os.fsync, []
    write(path, 1.0)
    before = path.read_bytes()

    def lose_a_bit(descriptor: int) -> None:
        brought.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        with brought[-1].open("r+b") as file:
            file.seek(-90, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", lose_a_bit)
    with pytest.raises(OSError, match=r"read back is not what was written: '.*/a'"):
        write(path, 2.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: brought.append(Path(f"/proc/self/fd/{descriptor}").resolve())
    )
    brought.clear()
    write(path, 2.0)
    assert path.read_bytes() != before
    assert brought[0].name.endswith(".partial")
    assert brought[1] == tmp_path  # its new name is brought to the disk too
