"""Give every test a cache folder and a seed of its own, and skip what needs a device or files that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rada_fast.system import notices
from tests.support import SHARED

settings.register_profile("rada_fast", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("rada_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu, with the reason, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep each test away from the user's cache and variables and from other tests' random numbers and warnings."""
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("RADA_FAST_BACKEND", raising=False)
    torch.manual_seed(0)
    with notices.collecting():
        yield


@pytest.fixture
def shared() -> Path:
    """Return the folder of published vectors and real features beside the checkout, or skip the test without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of published vectors beside this checkout")
    return SHARED
