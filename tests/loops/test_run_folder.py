"""A run's folder: refuses other runs, survives torn lines, writes whole files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rada_fast.config import RunOptions
from rada_fast.errors import UserError
from rada_fast.loops.run_folder import RunFolder

IDENTITY = {"command": "ttt", "options": {"seed": 0, "episode": {"lr": 1e-3}}}


def options(path: Path, **changes: bool) -> RunOptions:
    return RunOptions(output=str(path / "run"), **changes)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), IDENTITY)
    assert not folder.resumed
    folder.append("images.jsonl", {"id": "a"})
    again = RunFolder(options(tmp_path), IDENTITY)
    assert again.resumed
    assert again.read_lines("images.jsonl") == [{"id": "a"}]


def test_another_runs_folder_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    RunFolder(options(tmp_path), IDENTITY).append("images.jsonl", {"id": "a"})
    other = {"command": "ttt", "options": {"seed": 0, "episode": {"lr": 2e-3}}}
    with pytest.raises(UserError, match=r"holds another run's results \(differing: options.episode.lr\)"):
        RunFolder(options(tmp_path), other)
    folder = RunFolder(options(tmp_path, overwrite=True), other)
    assert folder.read_lines("images.jsonl") == []


def test_only_a_run_folder_is_ever_removed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "precious.txt").write_text("mine")
    RunFolder(options(tmp_path, overwrite=True), IDENTITY)
    assert (path / "precious.txt").read_text() == "mine"


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), IDENTITY)
    folder.append("images.jsonl", {"id": "a"})
    folder.append("images.jsonl", {"id": "b"})
    path = folder.path / "images.jsonl"
    for torn in (b'{"id": "c', b'{"id": "c"}', b"\xff\xfe"):
        path.write_bytes(b'{"id": "a"}\n{"id": "b"}\n' + torn)
        assert [record["id"] for record in folder.read_lines("images.jsonl")] == ["a", "b"]
        folder.append("images.jsonl", {"id": "d"})
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "d"]


def test_states_load_without_executing_code(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), IDENTITY)
    assert folder.load_state("state.pt") is None
    folder.save_state("state.pt", {"epoch": 3, "weights": {"a": torch.ones(2)}})
    state = folder.load_state("state.pt")
    assert state is not None
    assert state["epoch"] == 3
    assert sorted(path.name for path in folder.path.iterdir()) == ["run.json", "state.pt"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="output"):
        RunFolder(options(tmp_path), IDENTITY)


def test_numbers_that_json_lacks_are_never_written(tmp_path: Path) -> None:
    folder = RunFolder(options(tmp_path), IDENTITY)
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.append("images.jsonl", {"entropy": float("nan")})
