"""Every report names the machine and the versions; the table of all providers comes last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from rada_fast import _env
from rada_fast.loops.run_folder import versions

ROWS: list[dict[str, Any]] = []
SMALL_ROWS: list[dict[str, Any]] = []


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Where a benchmark puts its providers' figures."""
    return ROWS


@pytest.fixture
def small_rows() -> list[dict[str, Any]]:
    """The same for benchmarks of small ops, as interleaved.measure gives them."""
    return SMALL_ROWS


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["versions"] = versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = _env.cpu_capability()
    machine_info["cuda"] = torch.cuda.get_device_name() if _env.has_cuda() else None


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if _env.has_cuda() else f"{torch.get_num_threads()} CPU threads"
    return f"rada_fast {versions()['rada_fast']}, torch {torch.__version__}, {device}, {_env.cpu_capability()}"


def small_table() -> Table:
    table = Table(title="ratio: the baseline's median over this one's, interleaved; GB/s: of the least to be moved")
    for name in ("case", "provider", "us 20 %", "us 50 %", "us 80 %", "ratio", "GB/s"):
        table.add_column(name, justify="left" if name in ("case", "provider") else "right", no_wrap=True)
    previous = None
    for row in SMALL_ROWS:
        if previous not in (None, row["case"]):
            table.add_section()
        figures = [f"{row[name]:.1f}" for name in ("us_20", "us_50", "us_80", "ratio", "gb_per_s")]
        table.add_row(row["case"] if row["case"] != previous else "", row["provider"], *figures)
        previous = row["case"]
    return table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SMALL_ROWS:
        terminalreporter.ensure_newline()
        Console(width=120).print(small_table())
    if not ROWS:
        return
    table = Table(
        title="ratio: literal float32's best time over this one's; share: of the measured matrix-product peak"
    )
    for name in ("case", "provider", "median ms", "spread ms", "ratio", "share", "extra MiB"):
        table.add_column(name, justify="left" if name in ("case", "provider") else "right", no_wrap=True)
    previous = None
    for row in ROWS:
        if previous not in (None, row["case"]):
            table.add_section()
        table.add_row(
            row["case"] if row["case"] != previous else "",
            row["provider"],
            f"{row['median_ms']:.2f}",
            f"{row['spread_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['share']:.2f}",
            f"{row['extra_mib']:.0f}",
        )
        previous = row["case"]
    terminalreporter.ensure_newline()
    Console(width=120).print(table)
