"""The host's time is measured with a stub in the place of the CUDA driver, on any machine."""

from __future__ import annotations

import json

import pytest

from benchmarks import host_time, timing


def test_a_line_for_the_step_and_each_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    assert host_time.main(["--json", "--sizes", "1x50"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    launches = rows[0]["launches"]
    assert [row["provider"] for row in rows] == [
        "forward and backward", "forward without gradients", f"{launches} launches by Triton's own call",
    ]  # fmt: skip
    assert 0 < launches <= 10
    assert all(row["best_ms"] > 0 for row in rows)


def test_a_width_without_heads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        host_time.main(["--embed-dim", "12"])
    assert caught.value.code == 2
    assert "argument --embed-dim: num_heads must divide embed_dim" in capsys.readouterr().err
