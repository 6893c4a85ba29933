"""Executes the kernels' compiled PTX without a device, where the simulator lies beside the checkout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.conftest import SHARED

Simulated = Callable[[], AbstractContextManager[list]]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    """A context in which launches on CPU tensors run in the simulator, with memory, initialisation and race checks."""
    if not (SHARED / "ptxsim").is_dir():
        pytest.skip("no simulator beside this checkout")
    monkeypatch.syspath_prepend(str(SHARED))
    import ptxsim

    return lambda: ptxsim.simulated(racecheck=True, initcheck=True)


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors of this device run the kernels: "cpu" inside the simulator, "cuda" on a device."""
    if request.param == "cuda":
        yield "cuda"
        return
    simulated: Simulated = request.getfixturevalue("simulated")
    with simulated():
        yield "cpu"
