"""The command report: it reads finished runs, and writes their tables as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from rada_fast.config.tools import ReportOptions
from rada_fast.errors import UserError
from rada_fast.reports.measures import CONFIDENCE, ECE_BINS, MAX_EXACT
from rada_fast.reports.results import read_results
from rada_fast.reports.tables import (
    Row,
    average_rows,
    base_to_new_rows,
    class_rows,
    columns_of,
    comparison_rows,
    run_rows,
    set_rows,
)
from rada_fast.runs.contents import IDENTITY_FILE
from rada_fast.system import files
from rada_fast.system.terminal import PlainConsole, finite, print_json

STATEMENTS = (
    f"Intervals contain the true value with a probability of {100 * CONFIDENCE:.0f} %: Wilson's interval for the "
    "accuracy of a single run, or where no seed changes the accuracy, and Student's t over the seeds for several runs.",
    "The spread is the standard deviation over the seeds, with n - 1 in the denominator.",
    f"ECE is the expected calibration error in percent over {ECE_BINS} bins of equal width of the largest probability, "
    "before and after adaptation; images that could not be read are left out of it.",
    "An image that could not be read counts as a wrong answer everywhere else.",
    "Flips are images whose first answer becomes right or wrong by adaptation, as a mean over the seeds.",
    f"p is McNemar's: exact for up to {MAX_EXACT} differing answers, and beyond by the chi-squared distribution with a "
    "correction for continuity.",
    "The harmonic mean H is that of base and new accuracy. Over several sets there are two averages: the mean of the "
    "sets' harmonic means, and the harmonic mean of the mean accuracies.",
)


class ReportTable(NamedTuple):
    """A table of a report.

    name: the name of its entry in the JSON and of its files.
    title: its heading.
    rows: its rows.
    shown: the columns of the Markdown table, by their headings; each is one name, or several for a mean with its
        spread and its interval.
    """

    name: str
    title: str
    rows: list[Row]
    shown: Mapping[str, str]


def run_report(options: ReportOptions) -> int:
    """Write the tables of finished runs and print the short ones. Returns the exit status.

    Raises UserError naming a folder that is not one of a run, or an output folder that is one.
    """
    if not options.runs and not options.compare:
        raise UserError("runs must be given, the folders of finished runs")
    output = Path(options.output).expanduser()
    if (output / IDENTITY_FILE).exists():
        raise UserError(f"output {output} is the folder of a run; give another --output")
    tables = tables_of(options)
    write_tables(output, tables)
    if options.json:
        print_json(as_json(tables))
        return 0
    console = PlainConsole()
    for table in tables:
        if table.rows and table.name not in ("runs", "classes"):
            console.print(_for_terminal(table))
    console.print(f"tables in {output}", soft_wrap=True)
    return 0


def tables_of(options: ReportOptions) -> list[ReportTable]:
    """Return all tables of the runs that the options name."""
    evaluations = read_results(options.runs or options.compare)
    sets = set_rows(evaluations)
    compared = []
    if options.compare:
        first, second = (read_results([folder]) for folder in options.compare)
        for folder, found in zip(options.compare, (first, second), strict=True):
            if len({one.folder for one in found}) > 1:
                raise UserError(f"compare must name two runs, {folder} contains several")
        compared = comparison_rows(first, second)
    own = {"method": "method", "trained on": "trained_on", "data": "data"}
    accuracies = {"zero-shot": "zero_shot_top1", "adapted": "adapted_top1"}
    flips = {"wrong to right": "wrong_to_right", "right to wrong": "right_to_wrong"}
    halves = {
        f"{title} {short}": f"{name}_{column}"
        for name, title in (("zero_shot", "zero-shot"), ("adapted", "adapted"))
        for column, short in (
            ("base", "base"),
            ("new", "new"),
            ("harmonic_mean", "H"),
            ("mean_of_harmonic_means", "mean of H"),
            ("harmonic_mean_of_means", "H of means"),
        )
    }
    ece = {"ECE before": "zero_shot_ece", "ECE after": "adapted_ece"}
    return [
        ReportTable("runs", "Runs", run_rows(evaluations), {}),
        ReportTable(
            "sets",
            "Sets of images",
            sets,
            own | {"part": "part", "seeds": "seeds", "images": "images"} | accuracies | ece | flips | {"p": "p"},
        ),
        ReportTable("averages", "Averages over sets", average_rows(sets), own | {"part": "part"} | accuracies),
        ReportTable("base_to_new", "Base to new", base_to_new_rows(evaluations), own | {"seeds": "seeds"} | halves),
        ReportTable(
            "comparison",
            "Two runs compared",
            compared,
            {
                "first": "first", "second": "second", "data": "data", "part": "part", "images": "images",
                "first accuracy": "first_top1", "second accuracy": "second_top1",
                "only first right": "only_first_right", "only second right": "only_second_right", "p": "p",
                "test": "test",
            },
        ),
        ReportTable(
            "classes",
            "Classes",
            class_rows(evaluations),
            {"method": "method", "data": "data", "part": "part", "class": "name", "images": "images"}
            | accuracies | flips | {"mostly taken for": "taken_for"},
        ),
    ]  # fmt: skip


def write_tables(output: Path, tables: Sequence[ReportTable]) -> None:
    """Write report.json, report.md, classes.md and a CSV file for each table that has rows."""
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / "report.json", finite(as_json(tables)))
    for table in tables:
        path = output / f"{table.name}.csv"
        if table.rows:
            files.write_text(path, as_csv(table.rows), encoding="utf-8")
        else:
            files.remove(path)
    short = [table for table in tables if table.name not in ("runs", "classes")]
    files.write_text(output / "report.md", as_markdown("Report", short), encoding="utf-8")
    classes = [table for table in tables if table.name == "classes"]
    files.write_text(output / "classes.md", as_markdown("Classes", classes), encoding="utf-8")


def as_json(tables: Sequence[ReportTable]) -> dict[str, Any]:
    """Return all tables as plain values."""
    return {"statements": list(STATEMENTS), **{table.name: table.rows for table in tables}}


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV with a line of headings. Empty cells have no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def as_markdown(title: str, tables: Sequence[ReportTable]) -> str:
    """Return tables as Markdown, with the statements about their measures at the end."""
    lines = [f"# {title}", ""]
    for table in tables:
        if not table.rows:
            continue
        headings, cells = _cells(table)
        right = [all(_is_number(row.get(table.shown[heading])) for row in table.rows) for heading in headings]
        lines += [f"## {table.title}", "", f"| {' | '.join(headings)} |"]
        lines.append(f"|{'|'.join(' ---: ' if one else ' --- ' for one in right)}|")
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
        lines.append("")
    lines += [f"- {statement}" for statement in STATEMENTS]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace").decode()


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _cells(table: ReportTable) -> tuple[list[str], list[list[str]]]:
    """Return the headings of a table and the texts of its cells, without columns that have no value."""
    used = {
        heading: name for heading, name in table.shown.items() if any(row.get(name) is not None for row in table.rows)
    }
    return list(used), [[cell_text(row, name) for name in used.values()] for row in table.rows]


def cell_text(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a cell. A measure comes with its spread and its interval if the row has them."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return " ".join(str(value).split())
    if name == "p":
        return f"{value:.3g}"
    text = f"{value:.2f}"
    if (std := row.get(f"{name}_std")) is not None:
        text += f" ± {std:.2f}"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return text if low is None or high is None else f"{text} [{low:.2f}, {high:.2f}]"


def _for_terminal(table: ReportTable) -> Table:
    headings, cells = _cells(table)
    shown = Table(title=table.title, title_justify="left")
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in cells:
        shown.add_row(*row)
    return shown
