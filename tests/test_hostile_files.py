"""No file that a user may have from somebody else executes anything or makes a command write outside of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tests.hostile.data
import tests.hostile.models
import tests.hostile.runs  # noqa: F401 (these modules add their cases to CASES)
from tests.hostile.planting import CASES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run all cases in one process; see tests/hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    environment = os.environ | {"RADA_FAST_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.hostile", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_what_payloads_do_is_seen(results: dict[str, dict[str, Any]]) -> None:
    assert results["control"]["executed"]
    assert [event.split()[0] for event in results["control"]["seen"]] == ["os.system", "open"]


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_or_ignored(name: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[name]
    assert not result["executed"]
    assert result["seen"] == []
    assert result["victim"] == "untouched"
    assert result["status"] in CASES[name].statuses, result["lines"]
    # One line says what is wrong; warnings and notes of a run that goes on are lines too.
    lines = [line for line in result["lines"] if not line.startswith(("rada-fast: warning: ", "rada-fast: note: "))]
    assert len(lines) == (result["status"] not in (0, 1)), lines  # doctor's report of faults is on standard output
    assert all(line.startswith("rada-fast: ") and line.isprintable() for line in result["lines"]), result["lines"]
    assert result["seconds"] < 60
