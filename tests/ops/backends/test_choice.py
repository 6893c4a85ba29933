"""Which backend is in force where, and that compiled code follows it."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounter

from rada_fast.ops import use_backend
from rada_fast.ops._backends.choice import chosen_backend


def test_compiled_code_follows_the_backend_in_force() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    length = torch.compile(lambda x: x + len(chosen_backend()), fullgraph=True, backend=counter)

    def answers() -> int:
        return int(length(torch.zeros(())))

    assert answers() == len("auto")
    with use_backend("reference"):
        assert answers() == len("reference")
        with use_backend("cpu"):
            assert answers() == len("cpu")
        assert answers() == len("reference")
    assert answers() == len("auto")
    assert counter.frame_count == 3, "what was compiled for a backend serves again"
