"""The Triton backend serves many images of several episodes, gradients of a single result, and masks with NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.kernels.class_attention import Attended
from rada_fast.kernels.masked_logits import masked_logits_backward, masked_logits_forward
from rada_fast.ops import rational_adapter
from tests.support import assert_within_budget, problem, solve_weighted

from .conftest import Simulated

CONFIG = AdapterConfig.official(32, num_heads=2)
F32, F64 = torch.float32, torch.float64


def assert_as_the_reference(
    simulated: Simulated, config: AdapterConfig, inputs: tuple[Tensor, Tensor, dict[str, Tensor]], **options: Any
) -> None:
    exact, plain = (solve_weighted(config, inputs, dtype, "reference", **options) for dtype in (F64, F32))
    with simulated():
        fast = solve_weighted(config, inputs, F32, "triton", **options)
    assert_within_budget(exact, plain, fast, F32)


@pytest.mark.parametrize(
    ("config", "episodes", "images", "classes", "penalty"),
    [
        # 17 images are more than one tile of the image query and of the images' gradients holds.
        (AdapterConfig.official(32, num_heads=1), 2, 17, 2, "linf"),
        # The deltas of a wide head are added up by the last program of each tile, of which the last is not full.
        (AdapterConfig.paper(64), 2, 1, 65, "l1"),
    ],
    ids=["many-images", "tiles-not-full"],
)
def test_several_episodes(
    config: AdapterConfig, episodes: int, images: int, classes: int, penalty: str, simulated: Simulated
) -> None:
    inputs = problem(config, episodes * images, classes, F32)
    own = [problem(config, images, classes, F32, seed=episode)[2] for episode in range(episodes)]
    stacked = {name: torch.stack([one[name] for one in own]) for name in own[0]}
    inputs = (inputs[0], inputs[1], stacked)
    assert_as_the_reference(simulated, config, inputs, penalty=penalty, episodes=episodes)


def test_episodes_that_differ_in_the_output_projection_alone(simulated: Simulated) -> None:
    """After a first step from zeros, weight decay has changed one copy of all other parameters for all episodes."""
    image, text, parameters = problem(CONFIG, 2, 5, F32)
    episodes = {name: value.expand(2, *value.shape) for name, value in parameters.items()}
    episodes |= {name: torch.stack([value, -value]) for name, value in parameters.items() if name.startswith("out")}
    with simulated():
        found = rational_adapter(image, text, 20.0, episodes, CONFIG, episodes=2, backend="triton")
    for index in range(2):
        own = {name: value[index] for name, value in episodes.items()}
        alone = rational_adapter(image[index : index + 1], text, 20.0, own, CONFIG, backend="reference")
        torch.testing.assert_close(found.logits[index : index + 1], alone.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("result", ["penalty", "mask"])
def test_gradients_of_a_single_result(result: str, simulated: Simulated) -> None:
    assert_as_the_reference(simulated, CONFIG, problem(CONFIG, 2, 5, F32), in_loss=(result,))


@pytest.mark.parametrize(("softmax", "queries"), [("matrix", ("image", "rational")), ("row", ("text", "rational"))])
def test_two_of_the_three_query_kinds(softmax: Any, queries: Any, simulated: Simulated) -> None:
    config = AdapterConfig.official(32, num_heads=2, softmax=softmax, queries=queries)
    assert_as_the_reference(simulated, config, problem(config, 2, 5, F32))


def test_a_mask_that_is_almost_zero_passes_its_gradient_on(device: str) -> None:
    """A small M has a distance M - 1 that 16 bits round to -1. Relu stops the gradient where it set M to 0 alone."""
    distances = torch.tensor([-2.0, -1.0, -0.5, 0.0, 1.0], dtype=torch.bfloat16)
    image = torch.ones(1, 32, dtype=torch.bfloat16, device=device)
    gradients = masked_logits_backward(
        image, image.expand(5, -1).contiguous(), torch.tensor(1.0, device=device), None,  # type: ignore[arg-type]
        torch.eye(32, dtype=torch.bfloat16, device=device), distances.to(device)[None, :, None].repeat(1, 1, 32),
        torch.ones(1, 5, device=device), None, None, None, num_heads=1, relu=True, inner=False,
    )  # fmt: skip
    wanted = (distances > -2).float()
    assert torch.equal(gradients.doffset.cpu().float(), wanted[None, :, None].expand(1, 5, 32))


def test_deltas_are_those_of_the_rounded_gradient(device: str) -> None:
    """The attention's backward pass reads the rounded dO. The differences dP - delta cancel with its deltas alone."""
    rows = [torch.randn(2, 5, 64, device=device).bfloat16() for _ in range(2)]
    attended = Attended(rows[0], None, None, rows[0], *[None] * 4)  # type: ignore[arg-type]
    gradients = masked_logits_backward(
        torch.randn(2, 64, device=device).bfloat16(), torch.randn(5, 64, device=device).bfloat16(),
        torch.tensor(1.0, device=device), attended, torch.randn(64, 64, device=device).bfloat16(), rows[1],
        torch.randn(2, 5, device=device), None, None, None, num_heads=2, relu=False,
    )  # fmt: skip
    assert gradients.dattended is not None
    assert gradients.deltas is not None
    products = (gradients.dattended.double() * rows[0].double()).unflatten(-1, (2, 32)).sum(-1)
    torch.testing.assert_close(gradients.deltas[0].double(), products.permute(2, 0, 1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [5, 70])
def test_products_of_features_are_rounded_with_the_result_alone(device: str, dtype: torch.dtype, classes: int) -> None:
    """The rational matrix f * T has twice the digits of 16-bit features. No kernel may round it before it is used."""
    image, text = (torch.randn(rows, 64).to(dtype) for rows in (2, classes))
    dlogits, scale = torch.randn(2, classes), torch.tensor(1.0, device=device)
    exact = image.double()[:, None] * text.double()
    # Without an output projection every mask is 1.
    forward = masked_logits_forward(
        image.to(device), text.to(device), scale, exact.to(device, dtype), None, None, relu=False
    )
    torch.testing.assert_close(forward.sums.cpu().double(), exact.sum(-1), rtol=1e-5, atol=1e-5)
    backward = masked_logits_backward(
        image.to(device), text.to(device), scale, None, torch.eye(64, dtype=dtype, device=device),  # type: ignore[arg-type]
        None, dlogits.to(device), None, None, None, num_heads=1, relu=False, inner=False,
    )  # fmt: skip
    wanted = dlogits.double()[:, :, None] * exact
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(backward.doffset.cpu().double(), wanted, rtol=half * 1.001, atol=half * 1e-2)


def test_nan_in_a_mask_is_in_its_logits(simulated: Simulated) -> None:
    image, text, parameters = problem(CONFIG, 2, 5, F32)
    parameters["out_proj.bias"][3] = torch.nan
    with simulated():
        output = rational_adapter(image, text, 20.0, parameters, CONFIG, return_mask=True, backend="triton")
    assert output.mask is not None
    assert bool(output.logits.isnan().all())
    assert output.mask.isnan().sum(-1).tolist() == [[1] * 5] * 2
