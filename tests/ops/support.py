"""Mark the tests of the operators that need the extension, set PyTorch's threads, and check rounded results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rada_fast.ops import backends

CPU_BACKEND = backends()["cpu"]
needs_extension = pytest.mark.skipif(CPU_BACKEND != "usable", reason=f"cpu backend: {CPU_BACKEND}")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's mean and standard deviation of the colours."""


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_rounds_float32(call: Callable[[torch.dtype], Tensor]) -> None:
    """Check that a call gives in bfloat16 and in float16 the result that it gives in float32, rounded."""
    exact = call(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(call(dtype), exact.to(dtype)), dtype
