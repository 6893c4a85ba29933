"""The counts of a step in the simulator: launches, operations over the least, the literal baseline beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rada_fast import cli
from rada_fast.bench.counts import least_operations


def test_a_line_for_each_kernel_and_pass(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (shared / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    monkeypatch.syspath_prepend(str(shared))
    assert cli.main(["bench", "simulate", "--json", "--sizes", "1x64", "2x1x64", "--embed-dim", "128"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    totals = {(row["episodes"], row["kernel"]): row for row in rows}
    for episodes in (1, 2):
        # Episodes cost no launch of their own.
        assert totals[episodes, "forward"]["launches"] + totals[episodes, "backward"]["launches"] <= 10
        assert totals[episodes, "literal, both passes"]["launches"] > 50 * episodes
        assert totals[episodes, "forward"]["tensor_over_least"] >= 1
        # What must be moved is moved, and a quarter more at most.
        assert 1 <= totals[episodes, "forward"]["unique_over_least"] <= 1.25
        assert 1 <= totals[episodes, "backward"]["unique_over_least"] <= 1.25


def test_the_least_counts_products_only() -> None:
    assert least_operations(6, 1000, 512) == 6 * (8 * 1000 * 512**2 + 6 * 1000**2 * 512)


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "walk"], ["bench", "simulate", "--sizes", "6"]])
def test_what_cannot_be_run_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "bench" in capsys.readouterr().err or "--sizes" in arguments
