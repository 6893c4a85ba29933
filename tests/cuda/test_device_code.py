"""The kernel that says which copy of the device code runs."""

from __future__ import annotations

import numpy as np

from tests.cuda.conftest import Launchers


def test_the_simulator_runs_the_oldest_copy(launchers: Launchers) -> None:
    library = launchers("device_code.cu")
    architecture = np.zeros(1, np.int32)
    assert library.call("rada_fast_device_architecture", architecture, None) == 0
    assert architecture[0] == 800
