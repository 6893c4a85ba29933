"""A kernel reports which copy of the device code runs, and every kernel has a test that runs on a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rada_fast.extension import libraries
from tests.cuda.conftest import Launchers


def test_the_simulator_runs_the_oldest_copy(launchers: Launchers) -> None:
    library = launchers("device_code.cu")
    architecture = np.zeros(1, np.int32)
    assert library.call("rada_fast_device_architecture", architecture, None) == 0
    assert architecture[0] == 800


def test_every_kernel_has_a_test_on_a_device() -> None:
    folder = libraries.source_dir()
    assert folder is not None
    for source in (folder / "cuda").glob("*.cu"):
        # The copy that a device takes is asked for beside the other questions to the toolkit.
        elsewhere = Path(__file__).parents[1] / "extension" / "test_cuda_toolkit.py"
        tests = elsewhere if source.stem == "device_code" else Path(__file__).with_name(f"test_{source.stem}.py")
        assert "@pytest.mark.gpu" in tests.read_text(encoding="utf-8"), source.name
