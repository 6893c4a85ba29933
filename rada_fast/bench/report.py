"""Show the figures of the command `bench`: as a table, as JSON lines, or as a picture of the stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from rada_fast import _env
from rada_fast.bench.stages import SIZES, Figure
from rada_fast.config.measuring import MeasuringOptions
from rada_fast.errors import UserError
from rada_fast.runs.machine import versions
from rada_fast.system.files import write_text
from rada_fast.system.memory import keep_freed_memory
from rada_fast.system.terminal import PlainConsole, finite, print_json

MOST_LIMITS = 8
"""The limits of more settings are shown as the least and the greatest."""


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what every line of figures says about the machine and the programs that it was measured with."""
    on_device = device.type == "cuda"
    return {
        "machine": _env.processor_name(),
        "device": _env.cuda_device_name(device.index) if on_device else "cpu",
        "threads": torch.get_num_threads(),
        "instruction_set": _env.cpu_capability(),
        "keeps_freed_memory": keep_freed_memory(),
        "float32_products": torch.get_float32_matmul_precision(),
        "versions": versions(),
    }


Draw = Callable[[Path, str, Sequence[Figure], dict[str, Any]], None]
"""A function that draws the figures of a part to a file; the last argument is what machine_facts returned."""


class Presentation(NamedTuple):
    """How the figures of a part of the command are shown.

    columns: the columns of the table of a setting, and what stands in them for a stage's line of figures.
    legend: what the columns are; draw: the function that draws the picture.
    """

    columns: Mapping[str, Callable[[Figure], str]]
    legend: str
    draw: Draw


def show(
    part: str,
    settings: Iterable[list[Figure]],
    facts: dict[str, Any],
    options: MeasuringOptions,
    presentation: Presentation | None = None,
) -> int:
    """Print the figures of each setting as they come, and write the files that the options ask for.

    Returns the exit status.

    part: what was measured, "ttt" or "views", say.
    settings: the lines of figures of each setting.
    facts: what machine_facts returned.
    options: the options that say where the figures go.
    presentation: how they are shown; by default as stages.
    """
    presentation = presentation or STAGES
    console = PlainConsole()
    figures: list[Figure] = []
    for found in settings:
        if options.json:
            for figure in found:
                print_json(line_with(part, figure, facts), indent=None)
        else:
            for text in () if figures else facts_lines(facts):
                console.print(text, soft_wrap=True)
            console.print(f"\n{part}: {found[0]['setting']}", soft_wrap=True)
            stages = [figure for figure in found if figure["kind"] in ("stage", "part")]
            if stages:
                console.print_figures(figures_table(stages, presentation.columns, "stage"))
            for text in (*ratio_sentences(found), *refusal_sentences(found)):
                console.print(text, soft_wrap=True)
        figures += found
    if not options.json:
        console.print()
        for text in (*sentences(figures), presentation.legend):
            console.print(text, soft_wrap=True)
    if options.output is not None:
        picture, file = output_files(options.output, part)
        if file is not None:
            lines = (finite(line_with(part, figure, facts)) for figure in figures)
            write_text(file, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        presentation.draw(picture, part, figures, facts)
        if not options.json:
            console.print(f"picture: {picture}" + (f"; figures: {file}" if file else ""), soft_wrap=True)
    return 0


def line_with(part: str, figure: Figure, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a line of figures with what was measured and on which machine."""
    return {"bench": part, **figure, **facts}


def output_files(output: str, part: str) -> tuple[Path, Path | None]:
    """Return the picture's file and, where --output names a folder, the file of JSON lines. Makes missing folders."""
    path = Path(output)
    is_picture = path.suffix == ".png" and not path.is_dir()
    folder = path.parent if is_picture else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror}") from None
    return (path, None) if is_picture else (folder / f"bench-{part}.png", folder / f"bench-{part}.jsonl")


def draw(path: Path, part: str, figures: Sequence[Figure], facts: dict[str, Any]) -> None:
    """Draw a bar of the stages for every setting."""
    from rada_fast.reports.charts import StageBar, stages_picture

    bars = [
        StageBar(
            figure["setting"],
            figure["name"],
            figure["median"],
            figure["floor_ms"],
            whole=figure["share"] is None or figure["share"] == 1,
        )
        for figure in figures
        if figure["kind"] == "stage"
    ]
    for figure in figures:
        if figure["kind"] == "part":
            stage, _, name = figure["name"].rpartition(": ")
            row = f"{figure['setting']}\n{stage}, as it ran"
            bars.append(StageBar(row, name, figure["median"], figure["floor_ms"], whole=False))
    stages_picture(path, title=picture_title(part, facts), bars=bars)


def picture_title(part: str, facts: dict[str, Any]) -> str:
    """Return the title of a picture: what was measured, and on which machine."""
    place = facts["machine"] if facts["device"] == "cpu" else facts["device"]
    return f"rada-fast bench {part}: {place}, {facts['threads']} threads, {facts['instruction_set']}"


def facts_lines(facts: dict[str, Any]) -> list[str]:
    """Return the sentences above the table: the machine and the versions."""
    device = "" if facts["device"] == "cpu" else f", {facts['device']}"
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"{facts['machine']}{device}; {facts['threads']} threads, {facts['instruction_set']}, float32 products "
        f"{facts['float32_products']}",
        packages,
    ]


COLUMNS: dict[str, Callable[[Figure], str]] = {
    "stage": lambda figure: figure["name"] if figure["kind"] == "stage" else f"  {figure['name'].rpartition(': ')[2]}",
    "best ms": lambda figure: significant(figure["best"]),
    "median": lambda figure: significant(figure["median"]),
    "spread": lambda figure: significant(figure["spread"]),
    "share": lambda figure: significant(figure["share"]),
    "pictures/s": lambda figure: significant(figure["pictures_per_second"]),
    "GMAC": lambda figure: giga(figure["multiply_adds_per_picture"]),
    "GFLOP": lambda figure: giga(figure["operations_per_picture"]),
    "counted": lambda figure: giga(figure["counted_operations_per_picture"]),
    "floor ms": lambda figure: significant(figure["floor_ms"]),
    "gap": lambda figure: significant(figure["gap"]),
    "% peak": lambda figure: percent(figure["share_of_peak"]),
    "% bw": lambda figure: percent(figure["share_of_bandwidth"]),
    "peak MiB": lambda figure: significant(figure["peak_mib"]),
}
"""The columns of the table of a setting, and what stands in them for a stage's line of figures."""
LEGEND = (
    "GMAC, GFLOP: billions for each picture by the formula, a multiply-add counted as one and as two; counted: GFLOP "
    "by PyTorch's counter on plain PyTorch; floor: operations / product rate or bytes / bandwidth, whichever is more, "
    "part by part; gap: best / floor; % peak, % bw: of the machine's product rate and bandwidth; spread: the distance "
    "of the quartiles; indented lines are parts of the stage above them, counted while it ran"
)


STAGES = Presentation(COLUMNS, LEGEND, draw)


def figures_table(figures: Sequence[Figure], columns: Mapping[str, Callable[[Figure], str]], label: str) -> Table:
    """Make a table with a line for each figure and without columns that would be empty.

    columns: for each column, what stands in it for a figure; label: the column of names, which begins at the left.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = {name: [cell(figure) for figure in figures] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    for name in shown:
        table.add_column(name, justify="left" if name == label else "right", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def ratio_sentences(figures: Sequence[Figure]) -> list[str]:
    """Return a sentence for each ratio and for each exponent."""
    ratios = [
        f"{figure['name']} {significant(figure['best'])} (median {significant(figure['median'])}, "
        f"spread {significant(figure['spread'])}): {figure['inside']}"
        for figure in figures
        if figure["kind"] == "ratio"
    ]
    return ratios + [f"{figure['name']}: {figure['inside']}" for figure in figures if figure["kind"] == "exponent"]


def refusal_sentences(figures: Sequence[Figure]) -> list[str]:
    """Return a sentence for each stage that could not be measured."""
    return [f"{figure['name']}: not measured: {figure['inside']}" for figure in figures if figure["kind"] == "refusal"]


def limits_of(figures: Sequence[Figure]) -> dict[tuple[str, str], list[float]]:
    """Return what the machine could do in each setting, by the name of the limit and its unit."""
    limits: dict[tuple[str, str], list[float]] = {}
    for figure in figures:
        if figure["kind"] == "limit":
            limits.setdefault((figure["name"], figure["unit"]), []).append(figure["best"])
    return limits


def sentences(figures: Sequence[Figure]) -> list[str]:
    """Return the sentences below all tables: the limits, and what was timed."""
    limits = limits_of(figures)
    found = "; ".join(f"{name} in {unit}: {limit_values(values)}" for (name, unit), values in limits.items())
    inside = [f"{figure['name']}: {figure['inside']}" for figure in figures if figure["kind"] in ("stage", "part")]
    return [f"this machine, measured in the same rounds: {found}", *dict.fromkeys(inside)]


def limit_values(values: Sequence[float]) -> str:
    """Return the values of a limit in each setting, or only the extremes of many."""
    if len(values) <= MOST_LIMITS:
        return ", ".join(map(significant, values))
    return f"{significant(min(values))} to {significant(max(values))}"


def giga(value: float | None) -> str:
    """Return a number in billions, or an empty text for None."""
    return "" if value is None else significant(value / 1e9)


def percent(value: float | None) -> str:
    """Return a share as a percentage, or an empty text for None."""
    return "" if value is None else f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}"


def significant(value: float | None) -> str:
    """Return a number with about three digits that count, or an empty text for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def sizes_name(sizes: dict[str, Any]) -> str:
    """Return the name of a setting: its sizes in words."""
    letters = {
        "batch": "B", "episodes": "E", "views": "V", "image_size": "side", "classes": "K", "embed_dim": "D"
    }  # fmt: skip
    words = [
        f"{letters.get(name, name)} {value}" if name not in ("model", "precision", "view_kind") else str(value)
        for name in SIZES
        if (value := sizes.get(name)) is not None and name not in ("pretrained",)
    ]
    return ", ".join(words)
