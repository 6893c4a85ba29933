"""The programs that the matrix of versions runs in other environments still work with this package."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

MATRIX = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "matrix.py"))


@pytest.mark.parametrize(
    "program",
    [MATRIX["VERSIONS"], MATRIX["LOADED"].format("load"), MATRIX["LOADED"].format("load_cuda"), MATRIX["REFUSED"]],
    ids=["versions", "load", "load_cuda", "refused"],
)
def test_the_programs_of_the_matrix_run(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(program, {})
    assert len(capsys.readouterr().out.splitlines()) == 1
