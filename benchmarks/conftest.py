"""Every report names the machine and the versions; the table of all providers comes last.

Options of pytest that only the benchmarks have: --device, --providers and --figures, see pytest_addoption.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from rada_fast import _env
from rada_fast.extension import libraries
from rada_fast.runs.folder import versions

from . import harness

ROWS: list[dict[str, Any]] = []
SMALL_ROWS: list[dict[str, Any]] = []
LIMITS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rada_fast")
    group.addoption("--device", choices=["cpu", "cuda"], help="where to measure; without it, on the device if any")
    group.addoption("--providers", help="only these, separated by commas, in the benchmark of the adapter")
    group.addoption("--figures", type=Path, help="a file that receives every figure as a JSON line, as it is found")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device", None) == "cuda" and not _env.has_cuda():
        raise pytest.UsageError("no device: --device cuda was asked for and PyTorch sees no CUDA device")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where to measure: "cpu" or "cuda"."""
    asked: str | None = request.config.getoption("device", None)
    return asked or harness.default_device()


@pytest.fixture(scope="session")
def compiled_device(device: str) -> str:
    """The same for ops with a compiled operator for each device; without one there is nothing to compare."""
    if reason := libraries.load() if device == "cpu" else libraries.load_cuda():
        pytest.skip(f"no compiled operators for {device} tensors: {reason}")
    return device


@pytest.fixture(scope="session")
def wanted(request: pytest.FixtureRequest) -> list[str] | None:
    """The providers that --providers names; None without it."""
    asked: str | None = request.config.getoption("providers", None)
    return asked.split(",") if asked else None


@pytest.fixture(autouse=True)
def _written(request: pytest.FixtureRequest) -> Iterator[None]:
    """A benchmark's figures go to the file at once: what is killed later has left them there."""
    lists = (ROWS, SMALL_ROWS, LIMITS)
    before = [len(rows) for rows in lists]
    yield
    path: Path | None = request.config.getoption("figures", None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for row in (row for rows, start in zip(lists, before, strict=True) for row in rows[start:]):
                # A ratio to a baseline that was left out is no number, which JSON has no word for.
                known = {name: None if value != value else value for name, value in row.items()}
                file.write(json.dumps({"benchmark": request.node.name, **known}) + "\n")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Where a benchmark puts its providers' figures."""
    return ROWS


@pytest.fixture
def small_rows() -> list[dict[str, Any]]:
    """The same for benchmarks of small ops, as interleaved.measure gives them."""
    return SMALL_ROWS


@pytest.fixture
def limits() -> list[dict[str, Any]]:
    """The same for what a device can do at most: case, value, unit."""
    return LIMITS


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["versions"] = versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = _env.cpu_capability()
    machine_info["cuda"] = torch.cuda.get_device_name() if _env.has_cuda() else None


def pytest_report_header(config: pytest.Config) -> str:
    place = config.getoption("device", None) or harness.default_device()
    device = torch.cuda.get_device_name() if place == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"rada_fast {versions()['rada_fast']}, torch {torch.__version__}, {device}, {_env.cpu_capability()}"


def small_table() -> Table:
    table = Table(
        title="ratio: the baseline's median over this one's, interleaved; GB/s: of the least to be moved; "
        "on a device its own time, L2 flushed"
    )
    for name in ("case", "provider", "us 20 %", "us 50 %", "us 80 %", "ratio", "GB/s", "host us"):
        table.add_column(name, justify="left" if name in ("case", "provider") else "right", no_wrap=True)
    previous = None
    for row in SMALL_ROWS:
        if previous not in (None, row["case"]):
            table.add_section()
        figures = [f"{row[name]:.1f}" for name in ("us_20", "us_50", "us_80", "ratio", "gb_per_s")]
        host = "" if row["host_us"] is None else f"{row['host_us']:.1f}"
        table.add_row(row["case"] if row["case"] != previous else "", row["provider"], *figures, host)
        previous = row["case"]
    return table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SMALL_ROWS:
        terminalreporter.ensure_newline()
        Console(width=120).print(small_table())
    if not ROWS:
        return
    terminalreporter.ensure_newline()
    Console(width=120).print(adapter_table(ROWS))


def adapter_table(rows: list[dict[str, Any]]) -> Table:
    """The providers of the adapter; host and wall time only where a device was measured."""
    on_device = any(row["host_ms"] is not None for row in rows)
    share = "floor over best time" if on_device else "of the measured matrix-product peak"
    table = Table(title=f"ratio: literal float32's best time over this one's; share: {share}")
    columns = ["median ms", "spread ms", "ratio", "share", "extra MiB", *(["host ms", "wall ms"] if on_device else [])]
    for name in ("case", "provider", *columns):
        table.add_column(name, justify="left" if name in ("case", "provider") else "right", no_wrap=True)
    digits = {"share": 2, "ratio": 2, "extra MiB": 0}
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            table.add_section()
        values = [row[name.lower().replace(" ", "_")] for name in columns]
        table.add_row(
            row["case"] if row["case"] != previous else "",
            row["provider"],
            *(
                f"{value:.{digits.get(name, 3 if on_device else 2)}f}"
                for name, value in zip(columns, values, strict=True)
            ),
        )
        previous = row["case"]
    return table
