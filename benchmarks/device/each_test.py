"""A pytest plugin that records the outcome of each test as it ends, and stops where the device of the process is
broken.

After an illegal memory access every later CUDA call of the process fails, whatever it does. So the session ends there,
and the runner starts another process for the tests that are left.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = {"setup": "error", "call": "failed", "teardown": "error"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("each test")
    group.addoption("--events", type=Path, help="a file that gets a JSON line when a test starts and when it ends")
    group.addoption("--without", type=Path, help="a file with the ids of tests to leave out, one on each line")
    group.addoption("--share", default="0/1", help="I/N: run every N-th test only, starting with number I, from 0")


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def device_error() -> str | None:
    """The error that every CUDA call of this process raises from now on, or None. This never starts to use a device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # any error means that the device does not answer
        return first_line(str(error)) or type(error).__name__
    return None


class Writer:
    """Writes one JSON line when a test starts, when it ends, and when the session ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.file = config.getoption("events").open("a", encoding="utf-8", buffering=1)
        left_out: Path | None = config.getoption("without")
        self.left_out = set(left_out.read_text(encoding="utf-8").splitlines()) if left_out else set()
        self.first, self.every = map(int, config.getoption("share").split("/"))
        self.started = 0.0
        self.found: dict[str, Any] = {}
        self.stop: str | None = None

    def write(self, event: str, **fields: Any) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")

    # After "-m gpu" has chosen: only then are the tests shared out evenly.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        share = [item for item in items[self.first :: self.every] if item.nodeid not in self.left_out]
        if len(share) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item not in share])
            items[:] = share

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write("uncollected", test=report.nodeid, **self.error_of(report))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.write("start", test=item.nodeid)
        self.started, self.found = time.perf_counter(), {"outcome": "passed"}
        result = yield
        milliseconds = round(1e3 * (time.perf_counter() - self.started), 1)
        if self.found["outcome"] in ("failed", "error") and (broken := device_error()):
            self.stop = f"the device of this process is broken: {broken}"
        self.write("end", test=item.nodeid, ms=milliseconds, **self.found)
        if self.stop:
            item.session.shouldstop = self.stop
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            if self.found["outcome"] == "passed":
                self.found = {"outcome": OUTCOMES[report.when], **self.error_of(report)}
        elif report.skipped and self.found["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.found = {"outcome": "skipped", "error": first_line(reason).removeprefix("Skipped: ")}

    def pytest_sessionfinish(self) -> None:
        self.write("broken" if self.stop else "finished")

    @staticmethod
    def error_of(report: pytest.TestReport | pytest.CollectReport) -> dict[str, str]:
        crash = getattr(report.longrepr, "reprcrash", None)
        details = str(report.longrepr)
        last = next((line for line in reversed(details.splitlines()) if line.startswith("E ")), "")
        return {"error": first_line(crash.message if crash else last.removeprefix("E ") or details), "details": details}


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("events"):
        config.pluginmanager.register(Writer(config), "rada_fast_each_test")
