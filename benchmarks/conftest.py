"""What the benchmarks share: options, fixtures, and a report that names machine and versions and ends with the table.

The options --device, --providers, --seconds and --figures of pytest exist for the benchmarks only, see
pytest_addoption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import table, timing
from rada_fast import _env
from rada_fast.extension import libraries
from rada_fast.runs.machine import versions
from rada_fast.system import memory

Row = dict[str, Any]
ROWS: list[Row] = []
"""The rows of all benchmarks of this run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rada_fast")
    group.addoption(
        "--device", choices=["cpu", "cuda"], help="where to measure; by default on the CUDA device, if there is one"
    )
    group.addoption("--providers", help="measure only these, separated by commas, in the benchmark of the adapter")
    group.addoption(
        "--seconds", type=float, default=timing.SECONDS,
        help="about this long each provider of a case is timed; default %(default)s",
    )  # fmt: skip
    group.addoption("--figures", type=Path, help="a file to which every row of figures is added as a JSON line")


def pytest_configure(config: pytest.Config) -> None:
    memory.keep_freed_memory()  # every provider, the baselines included, is measured as the program runs
    timing.SECONDS = config.getoption("seconds", timing.SECONDS)
    if config.getoption("device", None) == "cuda" and not _env.has_cuda():
        raise pytest.UsageError("no device: --device cuda was asked for, but PyTorch finds no CUDA device")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where to measure: "cpu" or "cuda"."""
    asked: str | None = request.config.getoption("device", None)
    return asked or timing.default_device()


@pytest.fixture(scope="session")
def compiled_device(device: str) -> str:
    """The same for an op that is compiled for each device; the benchmark is skipped where that is missing."""
    if reason := libraries.load() if device == "cpu" else libraries.load_cuda():
        pytest.skip(f"no compiled operators for {device} tensors: {reason}")
    return device


@pytest.fixture(scope="session")
def chosen_providers(request: pytest.FixtureRequest) -> list[str] | None:
    """The providers that --providers names; None without it."""
    asked: str | None = request.config.getoption("providers", None)
    return asked.split(",") if asked else None


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The rows of one benchmark. They go to the --figures file as soon as it ends, before anything later can break."""
    found: list[Row] = []
    yield found
    ROWS.extend(found)
    path: Path | None = request.config.getoption("figures", None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"benchmark": request.node.name, **row}) + "\n" for row in found)


@pytest.fixture
def measured(benchmark: Any, rows: list[Row]) -> Callable[[timing.Case], None]:
    """A function that measures a case and keeps its rows.

    pytest-benchmark records the time of the whole case; its JSON file has the providers' rows as extra_info.
    """

    def run(case: timing.Case) -> None:
        rows.extend(benchmark.pedantic(timing.measure, args=(case,), rounds=1))
        benchmark.extra_info["providers"] = rows

    return run


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["versions"] = versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = _env.cpu_capability()
    machine_info["cuda"] = torch.cuda.get_device_name() if _env.has_cuda() else None


def pytest_report_header(config: pytest.Config) -> str:
    place = config.getoption("device", None) or timing.default_device()
    device = torch.cuda.get_device_name() if place == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"rada_fast {versions()['rada_fast']}, torch {torch.__version__}, {device}, {_env.cpu_capability()}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.ensure_newline()
    for line in table.summary(ROWS):
        terminalreporter.write_line(line)
