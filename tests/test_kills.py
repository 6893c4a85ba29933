"""A few runs are killed and go on to the results of uninterrupted ones; `make kills` kills two hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rada_fast import _env

ROOT = Path(__file__).parents[1]


def test_killed_runs_go_on_to_the_same_results(tmp_path: Path) -> None:
    """The kills are made by a process of its own: this one has threads, which a forked process would lack."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--count", "4", "--seed", "3", "--commands", "ttt", "eft"],
        cwd=ROOT, env=_env.with_variables(TMPDIR=str(tmp_path), OMP_NUM_THREADS="1"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (records, done.stderr)
    assert records[-1] == {"kills": 4, "identical": 4}
    assert all(record["differing"] == [] for record in records[:-1])
