"""The output of commands: tables and lines that show every text unchanged, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 4096
"""The width of output to a file or a pipe, in columns. It is so large that nothing is folded."""


class PlainConsole(Console):
    """A console that prints texts unchanged: brackets and colons of a path are not markup, and long lines are not cut.

    stderr: whether the console writes to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)
        if not self.is_terminal:
            self.width = FILE_WIDTH

    def on_broken_pipe(self) -> None:
        """Go on if nobody reads standard error; if nobody reads the output, let the command line end quietly."""
        if not self.stderr:
            raise BrokenPipeError


def table(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """Make a table with two columns, names and values. Long values are folded, never cut."""
    result = Table(title=title, show_header=False, title_justify="left")
    result.add_column(style="bold", overflow="fold")
    result.add_column(justify="right", overflow="fold")
    for name, value in rows:
        result.add_row(name, "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value))
    return result


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON on standard output. NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(finite(value), indent=indent, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """Return a plain value with None in place of NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value
