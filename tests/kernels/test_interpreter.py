"""The kernels run under Triton's interpreter, in a process of their own because it reads its variable once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SMALL = """
import os

import torch
from tests.kernels.test_rational_adapter import CASES
from rada_fast.config.method import AdapterConfig
from tests.support import assert_within_budget, problem, solve, with_large_scores

for name, (config, batch, classes, dtype, penalty) in CASES.items():
    if config.embed_dim > 128:
        continue
    inputs = problem(config, batch, min(classes, 37), dtype)
    exact = solve(config, inputs, torch.float64, "reference", penalty)
    plain = solve(config, inputs, dtype, "reference", penalty)
    assert_within_budget(exact, plain, solve(config, inputs, dtype, "triton", penalty), dtype)
    print(name)

for softmax in ("row", "matrix"):
    config = AdapterConfig.official(64, num_heads=2, softmax=softmax)
    for size in (1e2, 1e3, 1e4):
        inputs = with_large_scores(config, problem(config, 1, 20, torch.float32), size)
        exact = solve(config, inputs, torch.float64, "reference")
        plain = solve(config, inputs, torch.float32, "reference")
        for products in ("ieee", "tf32x3"):
            os.environ["RADA_FAST_FLOAT32"] = products
            assert_within_budget(exact, plain, solve(config, inputs, torch.float32, "triton"), torch.float32)
            print(softmax, size, products)
"""


def _interpreter_refused() -> str | None:
    triton = pytest.importorskip("triton")
    source = (Path(triton.__file__).parent / "runtime" / "interpreter.py").read_text(encoding="utf-8")
    if "int(self.handle.data)" in source and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} takes arrays of one element for numbers, "
            f"which NumPy {np.__version__} refuses"
        )
    return None


def test_every_option_on_small_shapes() -> None:
    if reason := _interpreter_refused():
        pytest.skip(reason)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SMALL],
        cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 27
