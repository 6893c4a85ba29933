"""Which backend is in force where, and that compiled code follows it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops import use_backend
from rada_fast.ops._backends import choice
from rada_fast.ops._backends.choice import chosen_backend, resolve_backend, resolve_device_backend


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


def test_a_backend_added_to_the_list_is_asked_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", (*choice.BACKENDS, "numpy"))
    monkeypatch.setattr(choice, "reason_unavailable", lambda name: None)
    assert resolve_backend("numpy", lambda name: None) == "numpy"
    with pytest.raises(BackendUnavailableError, match="'numpy' cannot serve this call: it has no gradients"):
        resolve_backend("numpy", lambda name: "it has no gradients")
    # The ops around the adapter choose their own where it is in force, and refuse it as an argument.
    with use_backend("numpy"):
        assert resolve_device_backend(torch.device("cpu")) in ("cpu", "reference")
    with pytest.raises(BackendUnavailableError, match="'numpy' cannot serve this call: it has no kernel for this op"):
        resolve_device_backend(torch.device("cpu"), "numpy")


def test_backends_in_plain_pytorch_are_never_asked() -> None:
    assert resolve_backend("literal", lambda name: "it serves nothing") == "literal"
    assert resolve_backend("auto", lambda name: "it serves nothing") == "reference"
