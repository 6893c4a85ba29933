"""The compiled backend needs no memory that grows with the square of the number of classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .support import needs_extension

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc"),
]

MEASURE = """
from torch.nn.functional import normalize
import torch
from rada_fast import AdapterConfig, RationalAdapter, adapt_episodes, use_backend
from rada_fast.bench.adapter import Problem, call_of
from rada_fast.bench.timing import memory_of
for classes in (1000, 2000):
    call = call_of(Problem(1, classes, "official", "float32", True), "cpu")
    call()
    print(memory_of(call, "cpu").extra_mib)
adapter = RationalAdapter(AdapterConfig.official(64))
for classes in (1000, 2000):
    views, text = (normalize(torch.randn(*shape), dim=-1) for shape in ((1, 20, 64), (classes, 64)))
    with use_backend("cpu"):
        print(memory_of(lambda: adapt_episodes(adapter, views, text, 100.0), "cpu").extra_mib)
"""


def test_memory_does_not_grow_with_classes_squared() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    half, full, half_episode, full_episode = map(float, done.stdout.split())
    # One K x K tensor of 8 heads would be 122 MiB; keys, values, queries and outputs are 4 MiB each.
    assert full < 80
    # A square would grow fourfold; 6 MiB are the weights' gradients, whatever K is.
    assert full <= 2.2 * half + 6
    # Two views of test-time training: one K x K tensor of 8 heads would be 244 MiB; keys and values are 1 MiB each.
    assert full_episode < 60
    assert full_episode <= 2.2 * half_episode + 6
