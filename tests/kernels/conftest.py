"""Executes the kernels' compiled PTX without a device, where the simulator lies beside the checkout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.conftest import SHARED

Simulated = Callable[[], AbstractContextManager[list]]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    """A context in which launches on CPU tensors run in the simulator, with memory, initialisation and race checks.

    One report is let through: several warps that write one shared word in one and the same instruction. Triton's layout
    conversion does so with copies of one value wherever a layout replicates a tensor over warps.
    """
    if not (SHARED / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    monkeypatch.syspath_prepend(str(SHARED))
    import ptxsim

    memory = sys.modules["ptxsim.memory"]
    owner = next(value for value in vars(memory).values() if isinstance(value, type) and "cp_done" in vars(value))
    report = owner.report

    def tolerant(
        self: object, ins: object, m: object, n: int, b: object, bad: object, why: str, lines: object = None
    ) -> None:
        if not why.endswith("(same instruction)"):
            report(self, ins, m, n, b, bad, why, lines)

    monkeypatch.setattr(owner, "report", tolerant)
    return lambda: ptxsim.simulated(racecheck=True, initcheck=True)
