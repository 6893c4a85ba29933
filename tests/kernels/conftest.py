"""Run the kernels without a device: a simulator beside the checkout executes their compiled PTX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import SHARED

Simulated = Callable[..., AbstractContextManager[list]]
"""A function that opens a context of simulated launches. The context gives a list of what each launch executed."""


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """Give a context in which launches on CPU tensors run in the simulator, which checks memory and races."""
    if not (SHARED / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    monkeypatch.syspath_prepend(str(SHARED))
    import ptxsim
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        _allow_equal_writes(monkeypatch)
    # PyTorch then fills new tensors with NaN. The simulator cannot tell which of them were never written.
    torch.use_deterministic_algorithms(True)
    yield partial(ptxsim.simulated, racecheck=True, initcheck=True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the device whose tensors run the kernels: "cpu" with launches simulated, and "cuda" on a device."""
    if request.param == "cuda":
        yield "cuda"
        return
    simulated: Simulated = request.getfixturevalue("simulated")
    with simulated():
        yield "cpu"


def _allow_equal_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept that several warps store the same value to the same place with one instruction, and nothing else.

    Triton before 3.7 converts some operands to another layout through shared memory, and several warps then write the
    same elements. The kernels do not choose these layouts. The writes are harmless while their values are equal, which
    this function checks.
    """
    from ptxsim.memory import SharedSpace

    report = SharedSpace.report

    def report_unless_equal(self: Any, ins: Any, m: Any, n: int, b: Any, bad: Any, why: str, lines: Any = None) -> None:
        if why != "write-after-write hazard (same instruction)" or not _writes_are_equal():
            report(self, ins, m, n, b, bad, why, lines)

    monkeypatch.setattr(SharedSpace, "report", report_unless_equal)


def _writes_are_equal() -> bool:
    # The checker knows only addresses. The values are local variables of the function that executes the store, which is
    # some frames further out.
    frame = sys._getframe()
    while frame is not None and not {"vals", "mm", "idx"} <= frame.f_locals.keys():
        frame = frame.f_back
    if frame is None:
        return False
    store = frame.f_locals
    lanes = [value if value.ndim == 0 or store["mm"] is None else value[store["mm"]] for value in store["vals"]]
    values = np.stack([np.broadcast_to(value, store["idx"].shape) for value in lanes], axis=-1)
    bits = np.ascontiguousarray(values).view(np.uint8).reshape(len(store["idx"]), -1)
    _, first, place = np.unique(store["idx"], return_index=True, return_inverse=True)
    return bool((bits == bits[first[place]]).all())
