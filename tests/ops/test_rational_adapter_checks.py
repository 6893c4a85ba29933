"""Arguments are checked before any arithmetic, and backends are chosen as asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rada_fast
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import BACKENDS, rational_adapter, resolve_backend
from tests.support import problem

from .support import needs_extension

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
        (
            {"logit_scale": torch.ones((), device="meta")},
            "logit_scale must be a number or on cpu as image_features are, got meta: move it there once, outside",
        ),
        ({"penalty": "l3"}, "penalty must be None or one of 'l2', 'l1', 'linf', got 'l3'"),
        ({"parameters": {}}, "parameters must hold 'q_proj1.weight'"),
    ],
)
def test_each_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changes)


class Waits(TorchDispatchMode):
    """Notes the operations that wait for a device: copies between two devices, and reading a number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        copies = "copy" in str(func) and len({tensor.device for tensor in tensors}) > 1
        if copies or "local_scalar_dense" in str(func):
            self.names.append(str(func))
        return result


def test_a_copy_of_a_scale_would_be_noted() -> None:
    with Waits() as waits:
        torch.tensor(100.0).to("meta", torch.float64)
        torch.tensor(100.0).item()
    assert len(waits.names) == 2


@pytest.mark.parametrize("logit_scale", [100.0, 100, torch.tensor(100.0), torch.tensor([100.0]), np.float32(100)])
@pytest.mark.parametrize("backend", ["reference", "literal"])
def test_no_form_of_the_scale_makes_the_host_wait(logit_scale: Any, backend: str) -> None:
    """The meta device stands for one that is not the host's."""
    elsewhere = torch.device("meta")
    adapter = RationalAdapter(CONFIG).to(elsewhere)
    scale = logit_scale.to(elsewhere) if isinstance(logit_scale, torch.Tensor) else logit_scale
    image, text = torch.ones(2, 16, device=elsewhere), torch.ones(3, 16, device=elsewhere)
    with Waits() as waits:
        call(
            image_features=image, text_features=text, parameters=dict(adapter.named_parameters()), logit_scale=scale,
            penalty="l2", backend=backend,
        )  # fmt: skip
    assert not waits.names


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


def test_threads_follow_the_open_block_and_choose_for_themselves() -> None:
    """A pool's threads may be older than the block, so that they must not copy the backend when they start."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(resolve_backend).result() == resolve_backend()
        with rada_fast.use_backend("literal"):
            assert pool.submit(resolve_backend).result() == "literal"

            def inside() -> tuple[str, str, str]:
                with rada_fast.use_backend("reference"):
                    own = resolve_backend()
                    entered.set()
                    checked.wait(10)
                return own, resolve_backend(), resolve_backend("reference")

            entered, checked = threading.Event(), threading.Event()
            future = pool.submit(inside)
            entered.wait(10)
            assert resolve_backend() == "literal"
            checked.set()
            assert future.result() == ("reference", "literal", "reference")
        assert pool.submit(resolve_backend).result() == resolve_backend()
        with pytest.raises(KeyError), rada_fast.use_backend("literal"):
            raise KeyError
        assert pool.submit(resolve_backend).result() == resolve_backend()


def test_gradients_are_computed_by_the_backend_of_their_forward() -> None:
    """Autograd runs the backward pass in threads of its own, which have entered no block."""
    adapter = RationalAdapter(CONFIG)
    with rada_fast.use_backend("reference"):
        logits = adapter(torch.ones(2, 16), torch.ones(3, 16), 10.0)
    with rada_fast.use_backend("literal"):
        logits.sum().backward()
    assert adapter.get_parameter("out_proj.weight").grad is not None


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


@pytest.mark.parametrize("own", [True, False], ids=["own-adapters", "one-adapter"])
@pytest.mark.parametrize("backend", ["reference", "literal", "auto"])
def test_episodes_are_as_many_calls(own: bool, backend: str) -> None:
    torch.manual_seed(0)
    parameters = {name: torch.randn(*value.shape) for name, value in RationalAdapter(CONFIG).state_dict().items()}
    stacked = {name: torch.stack([value, 0.5 * value]) if own else value for name, value in parameters.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in stacked.items()}
    image, text = torch.randn(6, 16), torch.randn(5, 16)
    output = rational_adapter(
        image, text, 2.0, leaves, CONFIG, penalty="l2", return_mask=True, episodes=2, backend=backend
    )
    assert output.penalty is not None
    assert output.mask is not None
    for episode in range(2):
        own_parameters = {name: value[episode] if own else value for name, value in stacked.items()}
        here = slice(3 * episode, 3 * episode + 3)
        alone = rational_adapter(
            image[here], text, 2.0, own_parameters, CONFIG, penalty="l2", return_mask=True, backend="reference"
        )
        torch.testing.assert_close(output.logits[here], alone.logits, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(output.mask[here], alone.mask, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.penalty[episode], alone.penalty, rtol=1e-4, atol=1e-4)
    (output.logits.sum() + output.penalty.sum()).backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_a_wrong_number_of_episodes_is_named() -> None:
    with pytest.raises(ValueError, match=r"episodes must be a positive divisor of B = 2, got 3"):
        call(episodes=3)
    with pytest.raises(ValueError, match=r"episodes must be a positive divisor of B = 2, got 0"):
        call(episodes=0)
    parameters = {name: value.expand(2, *value.shape) for name, value in RationalAdapter(CONFIG).named_parameters()}
    with pytest.raises(ValueError, match=r"parameter 'k_proj.bias' must be \(2, 16\), got \(16,\)"):
        call(episodes=2, parameters=parameters | {"k_proj.bias": torch.zeros(16)})
    with pytest.raises(ValueError, match=r"parameter 'q_proj1.weight' must be \(16, 16\), got \(2, 16, 16\)"):
        call(parameters=parameters)


@needs_extension
def test_auto_chooses_the_cpu_backend_for_cpu_tensors_and_otherwise_the_reference() -> None:
    for config in (
        AdapterConfig.official(64),
        AdapterConfig.official(64, num_layers=2),
        AdapterConfig.paper(64, mask_function="mlp"),
    ):
        image, text, parameters = problem(config, 2, 7, torch.float64)
        auto = rational_adapter(image, text, 9.0, parameters, config).logits
        plain = rational_adapter(image, text, 9.0, parameters, config, backend="reference").logits
        torch.testing.assert_close(auto, plain, rtol=1e-10, atol=1e-10)
