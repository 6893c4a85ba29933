"""Fixtures shared by the tests: the caches stay in the test's own folder, threads and seeds are fixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import SHARED

settings.register_profile("rada_fast", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("rada_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu say why they are skipped where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of the user's is read or written, no backend is forced from outside, draws repeat."""
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("RADA_FAST_BACKEND", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of official vectors and real features beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of official vectors beside this checkout")
    return SHARED
