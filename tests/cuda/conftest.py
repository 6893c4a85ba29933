"""Run the CUDA C++ launchers without a device: the simulator executes the PTX that nvcc compiles them to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from rada_fast.extension import cuda_toolkit, libraries
from tests.kernels.conftest import simulated as simulated  # whole episodes need both kinds of kernels
from tests.support import SHARED

Launchers = Callable[..., Any]


@cache
def _library(*names: str) -> Any:
    import ptxsim

    folder = libraries.source_dir()
    assert folder is not None
    return ptxsim.cuda_library(
        [str(folder / "cuda" / name) for name in names], include=[str(folder / "cuda")], racecheck=True, initcheck=True
    )


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> Launchers:
    """Return a function from sources in csrc/cuda to their launchers: ``launchers("x.cu").call("rada_fast_x", ...)``.

    Memory, initialisation and race checks are on; ``.log`` holds the counts of every launch.
    """
    if not (SHARED / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    if cuda_toolkit.find_nvcc() is None:
        pytest.skip("the simulator compiles with nvcc, which was not found")
    monkeypatch.syspath_prepend(str(SHARED))
    return _library
