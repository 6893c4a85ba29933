"""Fixtures of the tests of the command bench: the limits of the machine are measured on tiny buffers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rada_fast import cli
from rada_fast.bench import timing

Lines = list[dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Lines]:
    """Return a function that runs `rada-fast bench ... --json` for two rounds, and returns the lines it prints."""
    monkeypatch.setattr(timing, "HOST_PRODUCT_SIZE", 32)
    monkeypatch.setattr(timing, "HOST_COPIED_BYTES", 2**12)
    monkeypatch.setattr(timing, "BURST_SECONDS", 0.0)
    # Each measurement of memory collects garbage first, which takes long among all the objects of the tests.
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)

    def run(*arguments: str) -> Lines:
        assert cli.main(["bench", *arguments, "--json", "--repeats", "2"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run
