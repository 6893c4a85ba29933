"""The plan in docs/scale.md has the tables that its arithmetic gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale import DEVICES, SETS

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_documents_have_the_tables_of_today() -> None:
    text = DOCS.read_text()
    for table in scale.TABLES:
        assert "\n".join(table()) in text


def test_the_plan_adds_up() -> None:
    pictures = sum(one.number for one in SETS)
    assert f"{3 * pictures:,} pictures" in DOCS.read_text()
    for device in DEVICES:
        alone = sum(3 * one.number * scale.picture_ms(device, one.classes) for one in SETS) / 1e3
        assert scale.gpu_seconds(device) == pytest.approx(alone)
        # Eight nodes can be no faster than their share, and one node is as fast as one run after the other.
        runs = 3 * len(SETS) * scale.START_SECONDS
        assert scale._longest(device, 8) >= (alone / 8 + runs) / 8
        assert scale._longest(device, 1) == pytest.approx(alone / 8 + runs)
