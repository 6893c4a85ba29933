"""The output of commands: tables and lines that show every text unchanged, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

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

    def print_figures(self, table: Table) -> None:
        """Print a table of numbers, in several parts one below the other where the terminal is too narrow for it.

        A number that is folded reads as another one. Each part begins with the table's first column.
        """
        names, *columns = table.columns
        part: list[Column] = []
        for column in columns:
            if part and self._width_of(_with_columns(table, [names, *part, column])) > self.width:
                self.print(_with_columns(table, [names, *part]))
                part = []
            part.append(column)
        self.print(_with_columns(table, [names, *part]))

    def _width_of(self, table: Table) -> int:
        return Measurement.get(self, self.options.update(max_width=FILE_WIDTH), table).maximum

    def on_broken_pipe(self) -> None:
        """Go on if nobody reads standard error; if nobody reads the output, let the command line end quietly."""
        if not self.stderr:
            raise BrokenPipeError


def _with_columns(table: Table, columns: Iterable[Column]) -> Table:
    """Return a table that looks as another one does and has some of its columns."""
    columns = list(columns)
    result = Table(title=table.title, box=table.box, padding=table.padding)
    for column in columns:
        result.add_column(column.header, justify=column.justify, overflow=column.overflow)
    for row in zip(*(column.cells for column in columns), strict=True):
        result.add_row(*row)
    return result


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
