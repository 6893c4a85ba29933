"""The command that goes on is the one that was given, quoted for a shell, also under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rada_fast.system import invocation

ARGUMENTS = ["ttt", "--data", "imagefolder:my photos", "--output", "a'b"]
QUOTED = """ttt --data 'imagefolder:my photos' --output 'a'"'"'b'"""


@pytest.fixture(autouse=True)
def _kept_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocation, "_started", [])


def test_a_program_in_python_has_no_command_line() -> None:
    assert invocation.command_line() is None
    invocation.remember(ARGUMENTS, of_process=False)
    assert invocation.command_line() == f"rada-fast {QUOTED}"


def test_the_command_line_begins_as_the_process_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "rada-fast"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), *ARGUMENTS])
    for path, program in ((str(tmp_path), "rada-fast"), ("/nowhere", str(script))):
        monkeypatch.setenv("PATH", path)
        invocation.remember(ARGUMENTS, of_process=True)
        assert invocation.command_line() == f"{program} {QUOTED}"
    monkeypatch.setattr(sys, "argv", ["/x/rada_fast/__main__.py", *ARGUMENTS])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "rada_fast", *ARGUMENTS])
    invocation.remember(ARGUMENTS, of_process=True)
    assert invocation.command_line() == f"python3 -m rada_fast {QUOTED}"


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (["python", "/x/bin/torchrun", "--nproc-per-node", "2", "-m", "rada_fast", *ARGUMENTS],
         f"torchrun --nproc-per-node 2 -m rada_fast {QUOTED}"),
        (["python", "-m", "torch.distributed.run", "--standalone", "-m", "rada_fast", *ARGUMENTS],
         f"python -m torch.distributed.run --standalone -m rada_fast {QUOTED}"),
        (["srun", "something"], f"torchrun --nproc-per-node 2 -m rada_fast {QUOTED}"),
    ],
)  # fmt: skip
def test_the_launcher_of_several_processes_is_part_of_it(
    launcher: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(invocation, "_words_of_process", lambda id: launcher)
    invocation.remember(ARGUMENTS, of_process=True)
    assert invocation.command_line() == expected


def test_the_words_of_a_process_are_read() -> None:
    assert invocation._words_of_process(os.getpid())[-1:] == sys.orig_argv[-1:]
    assert invocation._words_of_process(2**30) == []
