"""RADA_FAST_TARGET=sm80 makes a newer device run the A100's code, and the results are as exact as those of its own.

A device that fails only without the variable shows a fault of the compiler, and one that fails with it too a fault of
the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from rada_fast import _env
from rada_fast.bench.compiled import compile_launch, step_launches
from rada_fast.config.method import AdapterConfig
from tests.support import assert_within_budget, problem, solve

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIG, BATCH, CLASSES = AdapterConfig.official(512), 6, 200


@contextmanager
def tensor_instructions() -> Iterator[set[str]]:
    """Open a block in which the names of the tensor cores' instructions in compiled kernels are added to a set."""
    import triton

    found: set[str] = set()

    def read(metadata_group: dict[str, str], **_: Any) -> None:
        for name, path in metadata_group.items():
            if name.endswith(".ptx"):
                code = Path(path).read_text(encoding="utf-8")
                found.update(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", code))

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = read
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


@pytest.fixture
def a100_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RADA_FAST_TARGET, and let Triton know, which otherwise happens when the kernels are imported."""
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "")  # so that it is unset again after the test
    monkeypatch.setenv("RADA_FAST_TARGET", "sm80")
    _env.pass_target_to_triton()


def test_the_a100s_code_runs_on_a_newer_target(a100_code: None, simulated: Any) -> None:
    config = AdapterConfig.official(64)
    inputs = problem(config, 2, 20, torch.bfloat16)
    with simulated():
        expected = solve(config, inputs, torch.bfloat16, "triton", wanted={"v_proj.weight"})
    # The simulator knows no instruction that is newer than the A100.
    with tensor_instructions() as found, simulated(cap=90):
        results = solve(config, inputs, torch.bfloat16, "triton", wanted={"v_proj.weight"})
    assert found == {"mma.sync"}
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", TYPES)
def test_hopper_has_its_own_code_without_the_variable(dtype: str, request: pytest.FixtureRequest) -> None:
    launches = step_launches(CONFIG, BATCH, CLASSES, TYPES[dtype])
    launch = next(launch for launch in launches if launch.kernel.__name__ == "masked_logits_forward_kernel")
    with tensor_instructions() as found:
        compile_launch(launch, 90, "")
    assert found == {"wgmma.mma_async"}
    request.getfixturevalue("a100_code")
    with tensor_instructions() as found:
        compile_launch(launch, 90, "")
    assert found == {"mma.sync"}


ON_A_DEVICE = """
import sys
import torch
from tests.kernels.test_targets import BATCH, CLASSES, CONFIG, TYPES, tensor_instructions
from tests.support import problem, solve

found = {}
for name, dtype in TYPES.items():
    image, text, parameters = problem(CONFIG, BATCH, CLASSES, dtype)
    moved = image.cuda(), text.cuda(), {key: value.cuda() for key, value in parameters.items()}
    with tensor_instructions() as instructions:
        results = solve(CONFIG, moved, dtype, "triton")
    found[name] = {key: value.cpu() for key, value in results.items()}, sorted(instructions)
torch.save(found, sys.argv[1])
"""


@cache
def on_a_device(target: str) -> dict[str, Any]:
    """Return the results of every type on a device, and the instructions that were used, from a process of its own."""
    root = Path(__file__).resolve().parents[2]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "found.pt"
        done = subprocess.run(
            [sys.executable, "-c", ON_A_DEVICE, str(path)],
            cwd=root, env=os.environ | {"RADA_FAST_TARGET": target, "TRITON_OVERRIDE_ARCH": ""}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = torch.load(path)
        return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", ["", "sm80"], ids=["own", "sm80"])
def test_outputs_and_gradients_of_both_targets(target: str, dtype: str) -> None:
    fast, instructions = on_a_device(target)[dtype]
    if target:
        assert instructions == ["mma.sync"]
    elif _env.cuda_device_capability()[0] == 9:
        assert "wgmma.mma_async" in instructions
    inputs = problem(CONFIG, BATCH, CLASSES, TYPES[dtype])
    exact = solve(CONFIG, inputs, torch.float64, "reference")
    plain = solve(CONFIG, inputs, TYPES[dtype], "reference")
    assert_within_budget(exact, plain, fast, TYPES[dtype])
