"""The short table that comes last: steps, what failed, figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from .runner import BAD, COUNTED, Result, short

WIDTH = 118
MOST_FAILURES = 25


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Aligned columns, numbers to the right; the last column takes what is left of the line."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    widths[-1] = min(widths[-1], max(20, WIDTH - sum(widths[:-1]) - 2 * len(widths) + 2))
    lines = []
    for row in [header, *rows]:
        cells = [cut(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append(
            "  ".join(
                cell.ljust(width) if at in left else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
        )
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def summary(results: Sequence[Result], tests: Sequence[dict[str, Any]], figures: Sequence[dict[str, Any]]) -> str:
    """All that an engineer with ten minutes reads."""
    rows = []
    for one in results:
        failed = sum(one.counts.get(name, 0) for name in BAD)
        counts = (one.counts.get("passed", 0), failed, one.counts.get("skipped", 0))
        rows.append([one.step, one.state, *(str(count or "") for count in counts), f"{one.seconds:.0f}", one.said])
    lines = table(
        ["step", "state", "passed", "failed", "skipped", "s", "first error, or what it tells"], rows, [0, 1, 6]
    )
    bad = [record for record in tests if record["outcome"] in BAD]
    if bad:
        lines += ["", f"{len(bad)} tests failed (failures.txt has the whole of it):"]
        shown = [[record["outcome"], short(record["test"]), record["error"]] for record in bad[:MOST_FAILURES]]
        lines += [f"  {line}" for line in table(["what", "test", "first line of the error"], shown, [0, 1, 2])]
        lines += [f"  and {len(bad) - MOST_FAILURES} more"] if len(bad) > MOST_FAILURES else []
    tally = {name: sum(record["outcome"] == name for record in tests) for name in COUNTED}
    lines += ["", "tests: " + (", ".join(f"{count} {name}" for name, count in tally.items() if count) or "none")]
    return "\n".join([*lines, *measured(figures)])


def measured(figures: Sequence[dict[str, Any]]) -> list[str]:
    """The device's limits in a sentence, the adapter's and the small ops' figures in a table each."""
    lines: list[str] = []
    limits = [record for record in figures if record["benchmark"].startswith("test_bench_floor")]
    if limits:
        said = ", ".join(f"{record['case']} {record['value']:.4g} {record['unit']}" for record in limits)
        lines += ["", *textwrap.wrap(f"measured limits: {said}", WIDTH)]
    adapter = [record for record in figures if "median_ms" in record]
    if adapter:
        header = ["adapter", "provider", "device ms", "literal / it", "floor / it", "host ms", "wall ms", "MiB"]
        rows = [
            [record["case"], record["provider"], number(record["median_ms"], 3), number(record["ratio"], 2),
             number(record["share"], 2), number(record["host_ms"], 3), number(record["wall_ms"], 3),
             number(record["extra_mib"], 0)]
            for record in adapter
        ]  # fmt: skip
        lines += ["", *table(header, rows, [0, 1])]
    small = [record for record in figures if "us_50" in record]
    if small:
        header = ["op", "provider", "device us", "plain / it", "GB/s", "host us"]
        rows = [
            [record["case"], record["provider"], number(record["us_50"], 1), number(record["ratio"], 2),
             number(record["gb_per_s"], 0), number(record["host_us"], 1)]
            for record in small
        ]  # fmt: skip
        lines += ["", *table(header, rows, [0, 1])]
    return lines


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
