"""The developers' simulation counts a training step's work and compares it with the least that the step needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import simulate
from rada_fast import _env
from rada_fast.bench.costs import least_operations


def test_the_simulation_prints_a_line_for_each_kernel_and_pass(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (shared / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    monkeypatch.syspath_prepend(str(shared))
    assert simulate.main(["--json", "--sizes", "1x64", "2x1x64", "--embed-dim", "128"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    totals = {(row["episodes"], row["kernel"]): row for row in rows}
    for episodes in (1, 2):
        # More episodes need no more launches.
        assert totals[episodes, "forward"]["launches"] + totals[episodes, "backward"]["launches"] <= 10
        assert totals[episodes, "literal, both passes"]["launches"] > 50 * episodes
        assert totals[episodes, "forward"]["tensor_over_least"] >= 1
        # At most a quarter more is moved than must be.
        assert 1 <= totals[episodes, "forward"]["unique_over_least"] <= 1.25
        assert 1 <= totals[episodes, "backward"]["unique_over_least"] <= 1.25


def test_the_least_operations_are_those_of_the_products() -> None:
    assert least_operations(6, 1000, 512) == 6 * (8 * 1000 * 512**2 + 6 * 1000**2 * 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 3x3 --preset small", "--preset"),
        ("--sizes", "--sizes"),
        ("--sizes 6", "--sizes: must be BxK or ExBxK, positive numbers, got '6'"),
        ("--sizes 0x3", "--sizes"),
        ("--sizes 1x2x3x4", "--sizes"),
        ("--sizes 6x200 99999x99999", "--sizes: must have a product of at most"),
        (f"--sizes 3x{'9' * 5000}", "--sizes"),
        ("--embed-dim 12", "--embed-dim: num_heads must divide embed_dim"),
        ("--embed-dim wide", "--embed-dim"),
    ],
)
def test_sizes_that_cannot_be_simulated_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        simulate.main(arguments.split())
    assert caught.value.code == 2
    assert f"argument {message}" in capsys.readouterr().err


def test_a_missing_simulator_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_env, "has_module", lambda name: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert simulate.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ptxsim" in line
    assert "PYTHONPATH" in line
    assert str(simulate.BESIDE) in line
