"""A kernel reports which copy of the device code runs, and every kernel has a test that runs on a device."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rada_fast.extension import libraries
from tests.cuda.conftest import Launchers


def test_the_simulator_runs_the_oldest_copy(launchers: Launchers) -> None:
    library = launchers("device_code.cu")
    architecture = np.zeros(1, np.int32)
    assert library.call("rada_fast_device_architecture", architecture, None) == 0
    assert architecture[0] == 800


def test_all_work_is_put_on_the_callers_stream() -> None:
    """The simulator has no streams. On a device, work on another stream would start before its inputs are there."""
    folder = libraries.source_dir()
    assert folder is not None
    found = 0
    for source in sorted((folder / "cuda").glob("*.cu*")):
        text = source.read_text(encoding="utf-8")
        for configuration in re.findall(r"<<<(.*?)>>>", text, re.DOTALL):
            # The grid, the block, the bytes of shared memory, and the stream.
            assert re.search(r", \w+, stream$", configuration), f"{source.name}: <<<{configuration}>>>"
            found += 1
        for call in re.findall(r"\bcuda(?:Mem|Launch|Device|Stream|Event)\w*\(.*?\);", text, re.DOTALL):
            assert re.match(r"cudaMemsetAsync\(.*, stream\);$", call, re.DOTALL), f"{source.name}: {call}"
    assert found >= 10
    for glue in (folder / "cuda").glob("*_torch.cpp"):
        calls = re.findall(r"\bcheck\((.*?)\);", glue.read_text(encoding="utf-8"), re.DOTALL)
        assert calls, glue.name
        assert all(call.endswith("launch.stream)") for call in calls), glue.name


def test_every_kernel_has_a_test_on_a_device() -> None:
    folder = libraries.source_dir()
    assert folder is not None
    for source in (folder / "cuda").glob("*.cu"):
        # The copy that a device takes is asked for beside the other questions to the toolkit.
        elsewhere = Path(__file__).parents[1] / "extension" / "test_cuda_toolkit.py"
        tests = elsewhere if source.stem == "device_code" else Path(__file__).with_name(f"test_{source.stem}.py")
        assert "@pytest.mark.gpu" in tests.read_text(encoding="utf-8"), source.name
