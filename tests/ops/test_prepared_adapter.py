"""A prepared adapter gives the results and gradients of rational_adapter on every backend, for every wanted tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.ops import PreparedAdapter, backends, rational_adapter
from rada_fast.ops.rational_adapter import parameter_shapes

BACKENDS = [
    "reference",
    "literal",
    pytest.param("cpu", marks=pytest.mark.skipif(backends()["cpu"] != "usable", reason="needs the extension")),
]
CONFIGS = [
    AdapterConfig.official(16),
    AdapterConfig.paper(16, queries=("text",)),
    AdapterConfig.official(16, mask_function="mlp"),
]


def problem(config: AdapterConfig, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(config)
    parameters = {name: (0.3 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    image, text = (normalize(torch.randn(n, 16, generator=generator), dim=-1).to(dtype) for n in (3, 7))
    return image, text, parameters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=["official", "paper", "mlp"])
def test_results_and_gradients_are_those_of_the_adapter(config: AdapterConfig, backend: str) -> None:
    if config.mask_function == "mlp" and backend != "reference":
        pytest.skip("only the reference computes it")
    image, text, parameters = problem(config)
    wanted = ["text_features", *parameters, "image_features"]
    prepared = PreparedAdapter(text, 5.0, parameters, config, penalty="l2", wanted=wanted, backend=backend)
    output, pullback = prepared(image)
    dlogits, dpenalty = torch.randn(3, 7), torch.tensor(1.5)
    found = pullback(dlogits, dpenalty)

    given = {"image_features": image, "text_features": text, **parameters}
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    own = {name: leaves[name] for name in parameters}
    expected = rational_adapter(
        leaves["image_features"], leaves["text_features"], 5.0, own, config, penalty="l2", backend=backend
    )
    assert expected.penalty is not None
    assert output.penalty is not None
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.penalty, expected.penalty)
    assert not output.logits.requires_grad
    gradients = torch.autograd.grad(
        [expected.logits, expected.penalty], [leaves[name] for name in wanted], [dlogits, dpenalty]
    )
    assert all(torch.equal(value, other) for value, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_change_in_place_count_from_the_next_call_on(backend: str, dtype: torch.dtype) -> None:
    config = CONFIGS[0]
    image, text, parameters = problem(config, dtype)
    scale = torch.tensor(5.0)
    prepared = PreparedAdapter(text, scale, parameters, config, wanted=["out_proj.weight"], backend=backend)
    prepared(image)
    parameters["v_proj.weight"].mul_(2)
    text.copy_(text.flip(0))
    scale.mul_(3)
    # A call that wants no gradients may round in another way.
    given = parameters | {"out_proj.weight": parameters["out_proj.weight"].clone().requires_grad_()}
    expected = rational_adapter(image, text, scale, given, config, backend=backend).logits
    output, pullback = prepared(image)
    assert torch.equal(output.logits, expected)
    assert output.penalty is None
    (gradient,) = pullback(torch.ones(3, 7, dtype=dtype), None)
    assert bool(gradient.any())


def test_arguments_that_do_not_fit_are_named() -> None:
    config = CONFIGS[0]
    image, text, parameters = problem(config)
    with pytest.raises(ValueError, match=r"wanted must name parameters or features, got 'q_proj9.weight'"):
        PreparedAdapter(text, 5.0, parameters, config, wanted=["q_proj9.weight"])
    with pytest.raises(ValueError, match=r"parameters must hold 'q_proj1.weight'"):
        PreparedAdapter(text, 5.0, {}, config, wanted=[])
    prepared = PreparedAdapter(text, 5.0, parameters, config, wanted=["out_proj.weight"])
    with pytest.raises(ValueError, match="image_features must have the adapter's width D = 16"):
        prepared(image[:, :3])
    with pytest.raises(TypeError, match=r"image_features must have text_features' dtype torch.float32"):
        prepared(image.double())


def test_autocast_decides_about_the_products() -> None:
    config = CONFIGS[0]
    image, text, parameters = problem(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared = PreparedAdapter(text, 5.0, parameters, config, wanted=["out_proj.weight"])
        (gradient,) = prepared(image)[1](torch.ones(3, 7), None)
        leaf = parameters["out_proj.weight"].clone().requires_grad_()
        rational_adapter(image, text, 5.0, parameters | {"out_proj.weight": leaf}, config).logits.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad)
