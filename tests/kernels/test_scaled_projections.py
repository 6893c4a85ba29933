"""Projections of an earlier call, scaled, take the place of products with parameters that are scaled alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.kernels.rational_projections import ProjectionBuffers
from rada_fast.kernels.scaled_projections import scaled_projections
from rada_fast.ops import rational_adapter, use_backend
from tests.support import problem

from .conftest import Simulated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("text", "rational", "image"), ("text",), ("image",), ("rational",)], ids="-".join)
def test_every_element_is_scaled_and_rounded_once(dtype: torch.dtype, kinds: tuple[str, ...], device: str) -> None:
    # Blocks that are not full, of all sizes.
    shapes = {
        "keys": (2, 33, 32),
        "values": (2, 33, 32),
        "rational": (2, 33, 32),
        "text": (3, 33, 32),
        "image": (2, 32),
    }
    drawn: dict[str, Tensor] = {
        name: torch.randn(shape, dtype=torch.float32 if name == "image" else dtype)
        for name, shape in shapes.items()
        if name in ("keys", "values", *kinds)
    }
    given = {name: value.to(device) for name, value in drawn.items()}
    counters = torch.full((1030,), 7, dtype=torch.int32, device=device)
    found = scaled_projections(
        ProjectionBuffers(
            given["keys"], given["values"], given.get("rational"), given.get("text"), given.get("image")
        ),
        0.875, counters,
    )  # fmt: skip
    results = {
        "keys": found.keys, "values": found.values, "rational": found.q_rational, "text": found.q_text,
        "image": found.q_image,
    }  # fmt: skip
    for name, value in results.items():
        if name not in drawn:
            assert value is None
        else:
            assert value is not None
            assert torch.equal(value.cpu(), (drawn[name].float() * 0.875).to(value.dtype))
    assert not counters.any()


@pytest.mark.parametrize("factor", [1.0, 0.75])
def test_results_and_gradients_are_those_of_the_scaled_parameters(factor: float, simulated: Simulated) -> None:
    config = AdapterConfig.official(32, num_heads=2)
    image, text, start = problem(config, 2, 20, torch.float32)
    image, text = image.detach(), text.detach()

    def solve(parameters: dict[str, Tensor], **options: Any) -> tuple[Any, list[Tensor]]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        output = rational_adapter(image, text, 20.0, leaves, config, penalty="l2", **options)
        assert output.penalty is not None
        return output, list(torch.autograd.grad([output.logits.sum() + output.penalty], list(leaves.values())))

    later = {name: value if name.startswith("out_proj.") else factor * value for name, value in start.items()}
    with use_backend("triton"), simulated() as log:
        first, _ = solve(start, keep_projected=True)
        before = len(log)
        fast, gradients = solve(later, projected=first.projected.scaled(factor))
        assert [stats.kernel for stats in log[before : before + 2]] == [
            "scaled_projections_kernel", "class_attention_forward_kernel"
        ]  # fmt: skip
        plain, expected = solve(later)
    torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.penalty, plain.penalty, rtol=1e-5, atol=1e-6)
    for value, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    with use_backend("literal"):
        assert solve(start, keep_projected=True)[0].projected is None
