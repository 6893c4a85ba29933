"""The summary at the end of a run: the steps, the tests that failed, and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import table
from benchmarks.device.runner import BAD, COUNTED, Result, short

MAX_FAILURES = 25


def summary(results: Sequence[Result], tests: Sequence[dict[str, Any]], figures: Sequence[dict[str, Any]]) -> str:
    """The text of the summary, short enough to be read at once."""
    rows = []
    for one in results:
        failed = sum(one.counts.get(name, 0) for name in BAD)
        counts = (one.counts.get("passed", 0), failed, one.counts.get("skipped", 0))
        rows.append([one.step, one.state, *(str(count or "") for count in counts), f"{one.seconds:.0f}", one.message])
    lines = table.aligned(
        ["step", "state", "passed", "failed", "skipped", "s", "first error, or what it shows"], rows, [0, 1, 6]
    )
    bad = [record for record in tests if record["outcome"] in BAD]
    if bad:
        lines += ["", f"{len(bad)} tests failed (failures.txt has their errors in full):"]
        shown = [[record["outcome"], short(record["test"]), record["error"]] for record in bad[:MAX_FAILURES]]
        lines += [f"  {line}" for line in table.aligned(["what", "test", "first line of the error"], shown, [0, 1, 2])]
        lines += [f"  and {len(bad) - MAX_FAILURES} more"] if len(bad) > MAX_FAILURES else []
    tally = {name: sum(record["outcome"] == name for record in tests) for name in COUNTED}
    lines += ["", "tests: " + (", ".join(f"{count} {name}" for name, count in tally.items() if count) or "none")]
    return "\n".join([*lines, *table.summary(figures)])
