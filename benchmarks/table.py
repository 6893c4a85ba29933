"""The tables of all benchmarks, as lines of text.

Only the standard library is used, so that a machine on which little is installed can print them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

WIDTH = 118
LEGEND = (
    "ratio: the baseline's best time over this one's; share: of the time that the machine's measured limits allow;",
    "GB/s: of the bytes that must be moved; extra MiB: peak memory during a call beyond what was in use before it",
)
DEVICE_LEGEND = "median, best and spread are the device's own time, with nothing in its L2 cache"


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """The lines of a table: header, rule, rows.

    left: the columns that are aligned to the left. The last column gets what is left of the line.
    """
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


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a run has measured: the device's limits in a sentence, and the providers of all cases in one table."""
    lines = []
    limits = [f"{row['case']} {row['value']:.4g} {row['unit']}" for row in rows if "unit" in row]
    if limits:
        lines += ["", *textwrap.wrap(f"measured limits: {', '.join(limits)}", WIDTH)]
    by_launch = [row for row in rows if "launch" in row]
    lines += ["", *launches(by_launch)] if by_launch else []
    measured = [row for row in rows if "provider" in row]
    return [*lines, "", *figures(measured)] if measured else lines


def launches(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of microseconds by launch, with a column for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    times = {(row["launch"], row["case"]): row["us"] for row in rows}
    names = list(dict.fromkeys(row["launch"] for row in rows))
    cells = [[name, *(number(times.get((name, case)), 1) for case in cases)] for name in names]
    return aligned(["launch, us", *cases], cells, [0])


def figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of rows from ``timing.measure``: a line for each case, and below it a line for each provider."""
    on_device = any(row["host_ms"] is not None for row in rows)
    header = ["provider", "median ms", "best ms", "spread ms", "ratio", "share", "GB/s", "extra MiB"]
    cells = [
        [
            f"  {row['provider']}",
            *(significant(row[name]) for name in ("median_ms", "best_ms", "spread_ms")),
            number(row["ratio"], 2),
            number(row["share"], 2),
            number(row["gb_per_s"], 1),
            number(row["extra_mib"], 0),
            *((significant(row["host_ms"]), significant(row["wall_ms"])) if on_device else ()),
        ]
        for row in rows
    ]
    top, rule, *lines = aligned([*header, *(("host ms", "wall ms") if on_device else ())], cells, [0])
    table = [*LEGEND, *([DEVICE_LEGEND] if on_device else []), "", top, rule]
    case = None
    for row, line in zip(rows, lines, strict=True):
        if row["case"] != case:
            case = row["case"]
            table.append(cut(case, WIDTH))
        table.append(line)
    return table


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """A positive number with four digits that count, but no more than five behind the point."""
    if value is None:
        return ""
    return number(value, min(5, max(0, 3 - math.floor(math.log10(value)))) if value > 0 else 0)
