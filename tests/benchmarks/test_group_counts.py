"""The developers' tool counts the launches of a group of episodes, and what each of them does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import group_counts
from rada_fast.extension import libraries

if reason := libraries.load():
    pytest.skip(f"no compiled operators: {reason}", allow_module_level=True)


def test_a_group_has_the_launches_of_the_product(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code is not compiled here; tests/benchmarks/test_device_model.py reads compiled code."""
    counts = {"loads": np.ones(7), "half_operations": np.full(7, 3.0), "loaded_bytes": np.ones(7)}
    monkeypatch.setattr(group_counts, "compiled_code", lambda *_: SimpleNamespace(asm={"ttgir": ""}))
    monkeypatch.setattr(group_counts, "programs_of", lambda *_: SimpleNamespace(counts=counts))
    assert group_counts.main(["--json", "--sizes", "1x20", "2x20"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for episodes in (1, 2):
        by_kernel = {row["kernel"]: row for row in rows if row["episodes"] == episodes}
        whole = by_kernel["group"]
        assert whole["launches"] == sum(row["launches"] for row in by_kernel.values()) - whole["launches"] == 30
        assert by_kernel["view_statistics"]["least_programs"] == 7
        # The first step stores the output projection's own values and moments and the other projections' decayed ones.
        # The second reads all of these and stores everything, and the last one stores the values in bfloat16 alone.
        output, others, own = 512 * 513, 5 * 512 * 513, episodes * 6 * 512 * 513
        first = episodes * output * (2 + 4 + 2 + 8) + 4 * output + others * (4 + 4 + 2)
        second = own * (2 + 4 + 2 + 8) + episodes * output * (4 + 8) + 4 * others
        last = own * (2 + 2 + 4 + 8)
        assert by_kernel["episodic_optimizer"]["distinct_bytes"] == first + second + last
    group_counts.main(["--sizes", "1x20", "--dtype", "float32"])
    assert "bound over the encoder's time" in capsys.readouterr().out
