"""Projections of an earlier call, scaled, take the place of products with parameters that are scaled alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.ops import rational_adapter
from rada_fast.ops.rational_adapter import AdapterOutput, parameter_shapes

from .support import needs_extension

IMAGES, CLASSES, WIDTH = 4, 131, 32
CONFIGS = {
    "official": AdapterConfig.official(WIDTH),
    "paper": AdapterConfig.paper(WIDTH),
    "image query": AdapterConfig.official(WIDTH, queries=("image",)),
    "merged kinds": AdapterConfig.paper(128, bias=True),
}
BACKENDS = [pytest.param("cpu", marks=needs_extension), "reference"]


def problem(
    config: AdapterConfig, dtype: torch.dtype, episodes: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the images, the text features and the parameters."""
    torch.manual_seed(0)
    width, lead = config.embed_dim, () if episodes is None else (episodes,)
    image, text = (normalize(torch.randn(rows, width), dim=-1).to(dtype) for rows in (IMAGES, CLASSES))
    shapes = parameter_shapes(config).items()
    return image, text, {name: 0.3 * torch.randn(*lead, *shape).to(dtype) for name, shape in shapes}


def solve(
    image: Tensor, text: Tensor, parameters: dict[str, Tensor], **named: Any
) -> tuple[AdapterOutput, list[Tensor]]:
    """Return the results and the gradients of the parameters."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    output = rational_adapter(image, text, 8.0, leaves, penalty="l2", **named)
    assert output.penalty is not None
    total = (output.logits * torch.linspace(-1, 1, output.logits.numel()).view_as(output.logits)).sum()
    gradients = torch.autograd.grad([total, output.penalty.sum()], list(leaves.values()))
    return output, list(gradients)


def scaled(parameters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return parameters of which all but the output's are scaled, and the output's are others."""
    return {name: value.sin() if name.startswith("out_proj.") else scale * value for name, value in parameters.items()}


@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize("episodes", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_those_of_the_scaled_parameters(
    backend: str, config: AdapterConfig, dtype: torch.dtype, episodes: int | None, scale: float
) -> None:
    image, text, parameters = problem(config, dtype, episodes)
    named: dict[str, Any] = {"config": config, "episodes": episodes}
    first, _ = solve(image, text, parameters, **named, backend=backend, keep_projected=True)
    assert first.projected is not None
    later = scaled(parameters, scale)
    fast, gradients = solve(image, text, later, **named, backend=backend, projected=first.projected.scaled(scale))
    wide = [value.double() for value in (image, text)]
    exact, expected = solve(
        *wide, {name: value.double() for name, value in later.items()}, **named, backend="reference"
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for found, right in zip(
        (fast.logits, fast.penalty, *gradients), (exact.logits, exact.penalty, *expected), strict=True
    ):
        assert found is not None
        assert right is not None
        torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance * max(1.0, right.abs().max().item()))


@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_forward_pass_does_not_read_parameters_whose_products_are_known(backend: str, scale: float) -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, torch.float32)
    first, _ = solve(image, text, parameters, config=config, backend=backend, keep_projected=True)
    assert first.projected is not None
    later = scaled(parameters, scale)
    known = {name: value if name.startswith("out_proj.") else value * torch.nan for name, value in later.items()}
    named: dict[str, Any] = {"config": config, "backend": backend, "projected": first.projected.scaled(scale)}
    assert torch.equal(solve(image, text, known, **named)[0].logits, solve(image, text, later, **named)[0].logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_projection_that_is_known_to_be_zero_changes_no_bit(backend: str) -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, torch.float32)
    zero = {name: 0 * value if name.startswith("out_proj.") else value for name, value in parameters.items()}
    promised, with_promise = solve(image, text, zero, config=config, backend=backend, output_is_zero=True)
    plain, without = solve(image, text, zero, config=config, backend=backend)
    assert torch.equal(promised.logits, plain.logits)
    assert all(torch.equal(one, other) for one, other in zip(with_promise, without, strict=True))


@needs_extension
def test_projections_of_another_batch_are_refused() -> None:
    config = CONFIGS["official"]
    image, text, parameters = problem(config, torch.float32)
    first, _ = solve(image, text, parameters, config=config, backend="cpu", keep_projected=True)
    with pytest.raises(RuntimeError, match="features of the same shapes"):
        solve(image[:2], text, parameters, config=config, backend="cpu", projected=first.projected)
