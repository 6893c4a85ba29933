"""Show the figures of `bench rivals`: speed, memory, operations and accuracy of each method in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from rada_fast.bench.report import facts_lines, figures_table, giga, machine_facts, significant
from rada_fast.bench.stages import Figure
from rada_fast.bench.timing import Memory, Times
from rada_fast.config.bench import BenchRivalsOptions
from rada_fast.errors import UserError
from rada_fast.reports.measures import exact_interval, paired_test
from rada_fast.system.files import write_text
from rada_fast.system.terminal import PlainConsole, finite, print_json

LEGEND = (
    "pictures/s: by the median of the rounds; encodings: the time over that of the row encode, from round to round; "
    "GMAC, GFLOP: billions for each picture, a multiply-add counted as one and as two; extra MiB: what a call on one "
    "picture takes beside what was in use before, peak: all of the process or of the device; accuracy: per cent, with "
    "the exact interval of 95 %; gained, lost: pictures that only the method, and only the zero-shot answer, gets "
    "right, and p by McNemar's exact test"
)


class Score(NamedTuple):
    """What a method did with all pictures.

    times: the milliseconds for one picture in each round; memory: that of a call on one picture.
    answers: the class of each picture; zero_shot: the class by the original view alone.
    """

    times: Times
    memory: Memory | None
    answers: list[int]
    zero_shot: list[int]


def figure_of(
    name: str,
    about: str,
    operations: float,
    score: Score,
    scores: Mapping[str, Score],
    labels: Sequence[int] | None,
    sizes: Mapping[str, Any],
) -> Figure:
    """Return the line of figures of a method.

    operations: those of one picture, a multiply-add counted as two.
    scores: the scores of all methods, by name.
    labels: the classes of the pictures, or None if they mean nothing to the model.
    sizes: what was measured, which every line says.
    """
    times, encode, fast = score.times, scores.get("encode"), scores.get("rada_fast")
    same = None if fast is None else sum(a == b for a, b in zip(score.answers, fast.answers, strict=True))
    return {
        "bench": "rivals",
        "name": name,
        "inside": about,
        **sizes,
        "unit": "ms for one picture",
        "best": times.best,
        "median": times.median,
        "spread": times.spread,
        "rounds": len(times.rounds),
        "pictures_per_second": 1e3 / times.median,
        "encodings": None if encode is None else times.over([encode.times]).median,
        "multiply_adds_per_picture": operations / 2,
        "operations_per_picture": operations,
        "peak_mib": None if score.memory is None else score.memory.peak_mib,
        "extra_mib": None if score.memory is None else score.memory.extra_mib,
        "same_answers_as_rada_fast": same,
        "changed_answers": sum(a != b for a, b in zip(score.answers, score.zero_shot, strict=True)),
        **(accuracies(score, labels) if labels is not None else {}),
    }


def accuracies(score: Score, labels: Sequence[int]) -> dict[str, Any]:
    """Return the accuracy before and after in per cent, with exact intervals, and how they differ."""
    right = [answer == label for answer, label in zip(score.answers, labels, strict=True)]
    before = [answer == label for answer, label in zip(score.zero_shot, labels, strict=True)]
    gained = sum(new and not old for new, old in zip(right, before, strict=True))
    lost = sum(old and not new for new, old in zip(right, before, strict=True))
    found: dict[str, Any] = {}
    for name, hits in (("zero_shot", sum(before)), ("adapted", sum(right))):
        found[f"{name}_right"] = hits
        found[f"{name}_top1"] = 100 * hits / len(labels)
        found[f"{name}_interval"] = list(exact_interval(hits, len(labels)))
    return found | {"gained": gained, "lost": lost, "p": paired_test(gained, lost).p}


def show(figures: Sequence[Figure], device: torch.device, options: BenchRivalsOptions) -> int:
    """Print the figures and write the file that the options ask for. Returns the exit status."""
    facts = machine_facts(device)
    lines = [{**figure, **facts} for figure in figures]
    console = PlainConsole()
    if options.json:
        for line in lines:
            print_json(line, indent=None)
    else:
        for text in facts_lines(facts):
            console.print(text, soft_wrap=True)
        first = figures[0]
        data = "the shifted domain of the embedded world" if "adapted_top1" in first else "drawn pictures"
        console.print(
            f"\nrivals: {first['model']}, {first['precision']}, {first['data'] if options.data else data}, "
            f"{first['pictures']} pictures, V {first['views']}, K {first['classes']}",
            soft_wrap=True,
        )
        console.print_figures(rivals_table(figures))
        if "zero_shot_top1" in first:
            low, high = first["zero_shot_interval"]
            console.print(f"zero-shot: {first['zero_shot_top1']:.2f} % right ({low:.2f} to {high:.2f})", soft_wrap=True)
        for figure in figures:
            console.print(f"{figure['name']}: {figure['inside']}", soft_wrap=True)
        console.print(LEGEND, soft_wrap=True)
    file = figures_file(options)
    if file is not None:
        write_text(file, "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines))
        if not options.json:
            console.print(f"figures: {file}", soft_wrap=True)
    return 0


def figures_file(options: BenchRivalsOptions) -> Path | None:
    """Return the file of the figures, or None where the options ask for none. Makes missing folders."""
    if options.output is None:
        return None
    folder = Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {folder} cannot be written: {error.strerror}") from None
    return folder / "bench-rivals.jsonl"


COLUMNS: dict[str, Callable[[Figure], str]] = {
    "method": lambda figure: figure["name"],
    "best ms": lambda figure: significant(figure["best"]),
    "median": lambda figure: significant(figure["median"]),
    "spread": lambda figure: significant(figure["spread"]),
    "pictures/s": lambda figure: significant(figure["pictures_per_second"]),
    "encodings": lambda figure: significant(figure["encodings"]),
    "GMAC": lambda figure: giga(figure["multiply_adds_per_picture"]),
    "GFLOP": lambda figure: giga(figure["operations_per_picture"]),
    "extra MiB": lambda figure: significant(figure["extra_mib"]),
    "peak MiB": lambda figure: significant(figure["peak_mib"]),
    "accuracy": lambda figure: accuracy_cell(figure),
    "gained": lambda figure: str(figure.get("gained", "")),
    "lost": lambda figure: str(figure.get("lost", "")),
    "p": lambda figure: significant(figure.get("p")),
    "changed": lambda figure: str(figure["changed_answers"]),
}
"""The columns of the table, and what stands in them for a method's line of figures."""


def accuracy_cell(figure: Figure) -> str:
    """Return the accuracy after adaptation with its interval, or an empty text where labels mean nothing."""
    if "adapted_top1" not in figure:
        return ""
    low, high = figure["adapted_interval"]
    return f"{figure['adapted_top1']:.1f} ({low:.1f} to {high:.1f})"


def rivals_table(figures: Sequence[Figure]) -> Table:
    """Make the table, with a line for each method."""
    return figures_table(figures, COLUMNS, "method")
