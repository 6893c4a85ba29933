"""What commands show: tables and lines that hold every text as it is, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 4096
"""Columns where output goes to a file or a pipe, in which nothing needs to be folded."""


class PlainConsole(Console):
    """A console that takes texts as they are: a path's brackets and colons are no markup, its end is not cut.

    stderr: whether it writes to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)
        if not self.is_terminal:
            self.width = WIDE

    def on_broken_pipe(self) -> None:
        """Go on without a reader of standard error; end quietly, in the command line, without one of the output."""
        if not self.stderr:
            raise BrokenPipeError


def table(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Two columns: what, and how much. Long values are folded, never cut."""
    result = Table(title=title, show_header=False, title_justify="left")
    result.add_column(style="bold", overflow="fold")
    result.add_column(justify="right", overflow="fold")
    for name, value in rows:
        result.add_row(name, "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    return result


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON on standard output; what is no finite number is null, which JSON can say."""
    print(json.dumps(finite(value), indent=indent, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """A plain value with None for NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value
