"""Arguments are checked before any arithmetic, and backends are chosen as asked."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import rada_fast
from rada_fast.config import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import BACKENDS, rational_adapter, resolve_backend

CONFIG = AdapterConfig.official(16)


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "image_features": torch.ones(2, 16),
        "text_features": torch.ones(3, 16),
        "logit_scale": 100.0,
        "parameters": dict(RationalAdapter(CONFIG).named_parameters()),
        "config": CONFIG,
    }
    return rational_adapter(**(arguments | changes)).logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_features": torch.ones(2, 3, 16)}, r"image_features must be \(B, D\), got \(2, 3, 16\)"),
        ({"image_features": torch.ones(2, 8)}, r"image_features must have the adapter's width D = 16, got \(2, 8\)"),
        ({"text_features": torch.ones(3, 4, 5)}, r"text_features must be \(K, D\), got \(3, 4, 5\)"),
        ({"text_features": torch.ones(0, 16)}, r"text_features must hold at least one class \(K >= 1\), got K = 0"),
        ({"text_features": torch.ones(3, 16).double()}, "text_features must have image_features' dtype torch.float32"),
        ({"text_features": torch.ones(3, 16).long()}, "text_features must be floating point, got torch.int64"),
        ({"image_features": [[1.0]]}, "image_features must be a tensor, got list"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must be a single multiplier, got shape \(2,\)"),
        ({"penalty": "l3"}, "penalty must be None or one of 'l2', 'l1', 'linf', got 'l3'"),
        ({"parameters": {}}, "parameters must hold 'q_proj1.weight'"),
    ],
)
def test_each_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changes)


def test_a_parameter_of_the_wrong_shape_is_named() -> None:
    parameters = dict(RationalAdapter(CONFIG).named_parameters()) | {"k_proj.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter 'k_proj.bias' must be \(16,\), got \(3,\)"):
        call(parameters=parameters)


def test_backends_says_of_each_whether_it_is_usable() -> None:
    assert tuple(rada_fast.backends()) == BACKENDS
    assert rada_fast.backends()["reference"] == "usable"
    assert rada_fast.backends()["literal"] == "usable"


def test_the_block_wins_over_the_environment_and_the_argument_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADA_FAST_BACKEND", "literal")
    assert resolve_backend() == "literal"
    with rada_fast.use_backend("reference"):
        assert resolve_backend() == "reference"
        assert resolve_backend("literal") == "literal"
    assert resolve_backend() == "literal"


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*got 'fast'"), rada_fast.use_backend("fast"):
        pass
    monkeypatch.setenv("RADA_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="RADA_FAST_BACKEND must be one of"):
        call()


def test_a_named_backend_never_falls_back() -> None:
    unusable = [name for name, state in rada_fast.backends().items() if state != "usable"]
    for name in unusable:
        with pytest.raises(rada_fast.BackendUnavailableError, match=f"backend '{name}' cannot be used: "):
            call(backend=name)


def test_import_needs_neither_triton_nor_the_extension_and_loads_no_torch() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as where it is not installed
sys.modules["rada_fast._C"] = None
import rada_fast
assert "torch" not in sys.modules, "import rada_fast must not import torch"
from rada_fast import RationalAdapter, AdapterConfig
RationalAdapter(AdapterConfig.official(16))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
