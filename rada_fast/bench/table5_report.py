"""Show the table of `bench table5` beside the paper's, with what each of its rows most likely counts, and its chart."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from rada_fast import _env
from rada_fast.bench.report import facts_lines, giga, machine_facts, output_files, significant
from rada_fast.config.measuring import MeasuringOptions
from rada_fast.system.files import write_text
from rada_fast.system.terminal import PlainConsole, finite, print_json

A100_TERAFLOPS = 312.0
"""The peak of an A100's products in 16 bits, in 10^12 operations per second."""
VIEW_GIGAFLOP, PROMPT_GIGAFLOP = 35.13, 5.96
"""The operations, in 10^9, of ViT-B/16 for one view and of its text encoder for one prompt, forward."""
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
"""What nvidia-smi is asked for."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 5, measured on an A100 of 40 GB with ViT-B/16.

    counts: what its figures most likely count, with the arithmetic.
    """

    setting: str
    method: str
    frames_per_second: float
    memory_gb: float
    gflops: float
    counts: str


def paper_rows() -> list[PaperRow]:
    """Return the rows of the paper's Table 5 with what they most likely count."""
    views = 68.39 * 64
    encoding = views * VIEW_GIGAFLOP / 1000
    maple_forward = (64 * VIEW_GIGAFLOP + 200 * PROMPT_GIGAFLOP) / 1000
    return [
        PaperRow(
            "eft", "MaPLe", 27.20, 1.09, 206.19,
            "frames: training iterations at batch 1, as for RAda. GFLOPs: multiply-adds of one forward pass; an image "
            "of 199 tokens and 2.912 for each prompt give K = 65, which is not the K of RAda's row",
        ),
        PaperRow(
            "eft", "RAda", 50.11, 0.49, 17.67,
            "frames: training iterations on one repeated batch of one picture in float32; the published code times "
            "1000 of them so, and 32 pictures in each would need more than the card's float32 rate. Memory: 0.487 GiB "
            "are the weights of both encoders and the adapter, its gradients and Adam's moments. GFLOPs: multiply-adds "
            "of one forward pass of one image, 17.58 for the encoder and 0.08 to 0.09 for the adapter at K = 50 or 51",
        ),
        PaperRow(
            "ttt", "MaPLe", 34.51, 1.31, 191.75,
            "GFLOPs: multiply-adds of one forward pass with K = 60. It cannot be 64 views: their forward pass at "
            f"K = 200 is {maple_forward:.2f} TFLOP, so that it alone would run at {34.51 * maple_forward:.0f} TFLOP/s, "
            f"and with the gradients two to three times as much, where the card has {A100_TERAFLOPS:.0f}. The "
            "activations of 64 views that the gradients need take several GB",
        ),
        PaperRow(
            "ttt", "RAda", 68.39, 0.61, 17.26,
            f"frames: not pictures of 64 views: 68.39 x 64 = {views:,.0f} views/s x {VIEW_GIGAFLOP} GFLOP = "
            f"{encoding:.0f} TFLOP/s, {100 * encoding / A100_TERAFLOPS:.0f} % of the card's peak for the encoder "
            "alone, in eager PyTorch, where 3,324 views/s are published for this encoder in bfloat16. Iterations at "
            f"batch 1 fit, or three counted iterations for each picture, {68.39 / 3:.1f} pictures/s. GFLOPs: "
            "multiply-adds of one forward pass of one view without the encoder's attention, 16.87, and 0.39 for the "
            f"adapter at K = 200; 64 views would be more than {64 * 16.87:,.0f}",
        ),
    ]  # fmt: skip


def device_facts(device: torch.device) -> dict[str, str | None]:
    """Return the driver and the clocks of a GPU as nvidia-smi tells them; an empty table on a CPU."""
    if device.type != "cuda":
        return {}
    program, found = shutil.which("nvidia-smi"), ""
    if program is not None:
        index = device.index if device.index is not None else _env.current_cuda_device()
        asked = [program, f"--id={index}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    values = [value.strip() for value in found.split(",")] if found else [None] * len(SMI)
    return {**dict(zip(SMI, values, strict=False)), "cuda": _env.cuda_version()}


def show(rows: Sequence[dict[str, Any]], sizes: dict[str, Any], device: torch.device, options: MeasuringOptions) -> int:
    """Print the tables, and write JSON and the chart where the options ask for them. Returns the exit status.

    rows: the lines of figures; sizes: what they say about the model.
    """
    facts = {**machine_facts(device), **device_facts(device)}
    paper = paper_rows()
    document = {
        "bench": "table5",
        "on": "a CPU" if device.type == "cpu" else "a GPU",
        **sizes,
        **facts,
        "timer": "the clock" if device.type == "cpu" else "CUDA events",
        "rows": list(rows),
        "paper": {"on": "one A100 of 40 GB, ViT-B/16", "rows": [vars(row) for row in paper]},
    }
    console = PlainConsole()
    if options.json:
        print_json(document, indent=None)
    else:
        print_tables(console, rows, paper, facts, title_of(sizes, facts))
    if options.output is not None:
        chart, file = files_of(options.output)
        draw(chart, rows, paper, title_of(sizes, facts))
        write_text(file, json.dumps(finite(document), indent=2, allow_nan=False) + "\n")
        if not options.json:
            console.print(f"figures: {file}; chart: {chart}", soft_wrap=True)
    return 0


def title_of(sizes: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the title of the table and of the chart, which says where it was measured."""
    place = f"a CPU ({facts['machine']}, {facts['threads']} threads)" if facts["device"] == "cpu" else facts["device"]
    return f"Table 5 on {place}, {sizes['model']}, {sizes['precision']}"


def files_of(output: str) -> tuple[Path, Path]:
    """Return the files of the chart and of the figures, which lie side by side. Makes missing folders."""
    chart, _ = output_files(output, "table5")
    return chart, chart.with_suffix(".json")


def print_tables(
    console: PlainConsole,
    rows: Sequence[dict[str, Any]],
    paper: Sequence[PaperRow],
    facts: dict[str, Any],
    title: str,
) -> None:
    """Print a table for each kind of frame, the paper's rows, and what all of them count."""
    for text in facts_lines(facts):
        console.print(text, soft_wrap=True)
    console.print(f"\n{title}", soft_wrap=True)
    for setting, frame, classes in dict.fromkeys((row["setting"], row["frame"], row["classes"]) for row in rows):
        console.print(f"\n{setting.upper()}, K {classes}; a frame is {frame}", soft_wrap=True)
        console.print_figures(table_of([row for row in rows if (row["setting"], row["frame"]) == (setting, frame)]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("the paper, on an A100", "frames/s", "memory, GB", "GFLOPs"):
        table.add_column(name, justify="left" if "paper" in name else "right")
    for row in paper:
        table.add_row(
            f"{row.setting.upper()} {row.method}", *map(str, (row.frames_per_second, row.memory_gb, row.gflops))
        )
    console.print(table)
    for row in paper:
        console.print(f"{row.setting.upper()} {row.method}: {row.counts}.", soft_wrap=True)
    console.print(LEGEND, soft_wrap=True)


LEGEND = (
    "frames/s: by the median of interleaved rounds; tensors: the peak of memory of a process of its own, without what "
    "Python and PyTorch take before the model is loaded; extra: without the weights too; GMAC and GFLOP: billions, a "
    "multiply-add counted as one and as two; forward: one forward pass of one image, which is what the paper's GFLOPs "
    "most likely are, with a multiply-add counted as one; frame: all that a frame executes, gradients included, "
    "counted by PyTorch's formulas of products, and for rada_fast by the formula of the least work"
)


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table of one kind of frame."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = (
        "method", "frames/s", "best ms", "median", "spread", "tensors MiB", "extra MiB", "forward GMAC",
        "forward GFLOP", "frame GMAC", "frame GFLOP",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["method"],
            *(significant(row[name]) for name in ("frames_per_second", "best_ms", "median_ms", "spread_ms")),
            *(significant(row[name]) for name in ("tensors_mib", "extra_mib")),
            giga(row["multiply_adds_of_one_forward"]),
            giga(row["operations_of_one_forward"]),
            giga(row["multiply_adds_per_frame"]),
            giga(row["operations_per_frame"]),
        )
    return table


def draw(path: Path, rows: Sequence[dict[str, Any]], paper: Sequence[PaperRow], title: str) -> None:
    """Draw the bars of all rows and of the paper's."""
    from rada_fast.reports.charts import CostRow, costs_picture

    bars = []
    for row in rows:
        views = f"{row['views']} views" if row["setting"] == "ttt" and row["views"] > 1 else "one view"
        group = "EFT, iterations" if row["setting"] == "eft" else f"TTT, {views}"
        memory = None if row["tensors_mib"] is None else row["tensors_mib"] / 1024
        bars.append(
            CostRow(group, row["method"], row["frames_per_second"], memory, row["multiply_adds_of_one_forward"] / 1e9)
        )
    for own in paper:
        bars.append(
            CostRow(
                f"{own.setting.upper()}, the paper (A100)", own.method, own.frames_per_second, own.memory_gb, own.gflops
            )
        )
    costs_picture(path, title=title, rows=bars)
