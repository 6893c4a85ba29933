"""The Triton backend multiplies float32 as PyTorch's settings and RADA_FAST_FLOAT32 say."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from rada_fast.ops._backends.triton import float32_precision

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
