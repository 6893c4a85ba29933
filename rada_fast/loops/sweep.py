"""Runs of eft over several data sets and seeds, and the tables of all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from rada_fast.config.commands import EFTOptions
from rada_fast.config.tools import ReportOptions
from rada_fast.data.published import COOP_SETS, coop_set, plain
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.models.prompts import DATASET_TEMPLATES
from rada_fast.reports.command import ReportTable, tables_of, write_tables
from rada_fast.system import notices, ranks

ALL_SETS = ("imagenet", *(name for name in DATASET_TEMPLATES if name != "imagenet"))
"""CoOp's eleven data sets."""
PLACE = "{set}"
"""The place for the name of a set in --train and --test."""
REPORT = "report"
"""The folder of the tables, beside those of the sets."""


class Run(NamedTuple):
    """One of the runs.

    name: the words for the run in a message.
    options: its options.
    """

    name: str
    options: EFTOptions


def run_eft_runs(options: EFTOptions) -> dict[str, Any]:
    """Run eft once, or once for each set and seed that the options name. Returns the summary.

    Finished runs are not repeated. A run that cannot be done does not keep the others from being done.

    Raises UserError naming an option that cannot be used, or the runs that could not be done.
    """
    if not options.sets and not options.seeds:
        if not options.train or not options.test:
            raise UserError("--train and --test must be given; 'rada-fast eft --help' shows an example")
        return run_eft(options)
    runs, group = runs_of(options), ranks.current()
    summaries: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        notices.note(f"run {number} of {len(runs)}: {run.name}")
        try:
            summaries.append(run_eft(run.options))
        except UserError as error:
            if group.several:
                raise  # the processes might disagree about what comes next
            notices.warn(f"{run.name} could not be done: {error}")
            failed[run.name] = str(error)
    output = Path(options.run.output).expanduser()

    def write_report() -> dict[str, Any]:
        report = ReportOptions(tuple(summary["output"] for summary in summaries), output=str(output / REPORT))
        tables = tables_of(report)
        write_tables(output / REPORT, tables)
        return _short(tables)

    results = group.from_first(write_report) if summaries else {}
    if failed:
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of {len(runs)} runs could not be done ({', '.join(failed)}); the first, {first}: "
            f"{failed[first]}. The others are finished, with tables in {output / REPORT}"
        )
    return {
        "command": "eft",
        "runs": len(runs),
        **results,
        "unreadable": sum(summary["unreadable"] for summary in summaries),
        "warnings": notices.so_far(),
        "tables": str(output / REPORT),
        "output": str(output),
    }


def runs_of(options: EFTOptions) -> list[Run]:
    """Return all runs that the options name, each with a folder of its own.

    Raises UserError naming all sets that are not found.
    """
    output, seeds = Path(options.run.output), options.seeds or (options.run.seed,)
    runs, missing = [], []
    for name in sets_of(options) or ("",):
        train, test = (_data(options, given, name) for given in (options.train, options.test))
        if name and not _exists(train):
            missing.append(train.partition(":")[2])
        for seed in seeds:
            folder = output / name / f"seed-{seed}"
            run = dataclasses.replace(options.run, output=str(folder), seed=seed)
            one = dataclasses.replace(options, train=train, test=test, sets=(), seeds=(), run=run)
            runs.append(Run(f"{name}, seed {seed}" if name else f"seed {seed}", one))
    if missing:
        raise UserError(f"sets must lie in --root, these do not: {', '.join(missing)}")
    return runs


def sets_of(options: EFTOptions) -> tuple[str, ...]:
    """Return the names of the sets that the options name. Raises UserError if a name is not one of CoOp's sets.

    With a {set} in --train, any name can be given.
    """
    if PLACE in options.train or not options.sets:
        return options.sets
    if options.sets == ("all",):
        return ALL_SETS
    for name in options.sets:
        if coop_set(name) is None and plain(name) != "imagenet":
            raise UserError(f"sets must be all or some of {', '.join(ALL_SETS)}, got {name!r}")
    return options.sets


def _data(options: EFTOptions, given: str, name: str) -> str:
    """Return the data of a set as KIND:PATH. given: the value of --train or --test, or an empty text without one."""
    if not name:
        if not given:
            raise UserError("--train and --test must be given, or --sets")
        return given
    if given and PLACE not in given:
        raise UserError(f"--train and --test must hold {PLACE} with --sets, or be left out; got {given}")
    return given.replace(PLACE, name) if given else f"coop:{options.root}/{name}"


def _exists(spec: str) -> bool:
    """Return whether the data of a set exist: the path itself or, for CoOp's sets, a folder with any of their names."""
    kind, _, text = spec.partition(":")
    path = Path(text).expanduser()
    if kind != "coop" or path.exists():
        return path.exists() or not kind
    known = next((one for one in COOP_SETS if one is coop_set(path.name)), None)
    wanted = {plain(name) for name in known.folders} if known is not None else {plain(path.name)}
    return path.parent.is_dir() and any(plain(child.name) in wanted for child in path.parent.iterdir())


def _short(tables: list[ReportTable]) -> dict[str, Any]:
    """Return the adapted accuracies of every set and of their averages, for the table on the terminal."""
    rows = {table.name: table.rows for table in tables}
    results: dict[str, Any] = {}
    for row in rows["base_to_new"]:
        columns = ("base", "new", "harmonic_mean", "mean_of_harmonic_means", "harmonic_mean_of_means")
        values = {column: row.get(f"adapted_{column}") for column in columns}
        results[row["data"]] = {name: round(value, 3) for name, value in values.items() if value is not None}
    for row in [*rows["sets"], *rows["averages"]]:
        if row["part"] not in ("base", "new"):
            results[row["data"]] = {"top1": round(row["adapted_top1"], 3)}
    return results
