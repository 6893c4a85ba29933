"""The Triton backend multiplies float32 as PyTorch's settings and RADA_FAST_FLOAT32 say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast.bench.compiled import recorded
from rada_fast.config.method import AdapterConfig
from rada_fast.errors import BackendUnavailableError
from rada_fast.kernels._common import MAX_EPISODES, episode_grid
from rada_fast.ops import rational_adapter
from rada_fast.ops._backends import triton
from rada_fast.ops._backends.triton import float32_precision
from tests.support import problem

matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _precision_afterwards() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(matmul, "fp32_precision"):  # the older setting has also set the newer one
        torch.backends.fp32_precision = "none"
        matmul.fp32_precision = "none"


def _allow_tf32() -> None:
    matmul.allow_tf32 = True


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (lambda: None, "tf32x3"),
        (lambda: torch.set_float32_matmul_precision("highest"), "tf32x3"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
        (_allow_tf32, "tf32"),
    ],
)
def test_float32_products_follow_pytorchs_first_settings(setting: Callable[[], None], expected: str) -> None:
    setting()
    assert float32_precision() == expected


@pytest.mark.skipif(not hasattr(matmul, "fp32_precision"), reason="PyTorch before 2.9 has no fp32_precision")
@pytest.mark.parametrize(
    ("everywhere", "products", "expected"),
    [
        ("none", "tf32", "tf32"), ("none", "ieee", "tf32x3"), ("tf32", "none", "tf32"), ("tf32", "ieee", "tf32x3"),
        ("ieee", "tf32", "tf32"),
    ],
)  # fmt: skip
def test_float32_products_follow_pytorchs_newer_settings(everywhere: str, products: str, expected: str) -> None:
    torch.backends.fp32_precision = everywhere
    if products != "none":
        matmul.fp32_precision = products
    assert float32_precision() == expected


def test_the_variable_overrides_pytorchs_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    monkeypatch.setenv("RADA_FAST_FLOAT32", "ieee")
    assert float32_precision() == "ieee"


def test_a_grid_counts_episodes_up_to_cudas_limit() -> None:
    assert episode_grid(7, episodes=MAX_EPISODES) == (7, MAX_EPISODES)
    assert episode_grid(7, 3, episodes=1) == (7, 3, 1)
    with pytest.raises(ValueError, match="episodes must be at most 65535, got 65536"):
        episode_grid(7, episodes=MAX_EPISODES + 1)


def test_more_episodes_than_a_grid_holds_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "executes_on_cpu", lambda: True)
    config = AdapterConfig.official(32, num_heads=4)
    image, text, parameters = problem(config, 1, 2, torch.float32)
    for episodes, refused in ((MAX_EPISODES, False), (MAX_EPISODES + 1, True)):
        images = image.expand(episodes, -1)
        assert bool(triton.reason_not_served(config, images, text, parameters, episodes=episodes)) == refused
    with pytest.raises(BackendUnavailableError, match="serves at most 65535 episodes, not 65536"):
        rational_adapter(images, text, 20.0, parameters, config, episodes=episodes, backend="triton")


def test_a_mode_sees_both_operators() -> None:
    """Without a mode the functions behind the operators are called directly."""
    config = AdapterConfig.official(32, num_heads=4)
    image, text, parameters = problem(config, 2, 3, torch.float32)
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def step() -> int:
        with recorded() as launches:
            rational_adapter(image, text, 20.0, leaves, config, backend="triton").logits.sum().backward()
        return len(launches)

    with Names():
        seen = step()
    assert {"rada_fast::rational_adapter_triton", "rada_fast::rational_adapter_triton_backward"} <= set(names)
    assert step() == seen > 0
