"""The cache returns the tensors that were stored, and neither damage nor a full disk ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rada_fast.data.tensor_cache import read_tensors, write_tensors


def test_stored_tensors_are_returned_and_damaged_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.safetensors"
    assert read_tensors(path) is None
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3).T})
    found = read_tensors(path)
    assert found is not None
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3).T)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]
    path.write_bytes(path.read_bytes()[:20])
    assert read_tensors(path) is None


def test_a_folder_that_cannot_be_written_warns(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written, going on without it"):
        write_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.zeros(1)})
