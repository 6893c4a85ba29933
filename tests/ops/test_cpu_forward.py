"""The compiled CPU backend where no gradient is wanted, against float64 by the error of plain PyTorch.

The matrix softmax then multiplies the values once for both kinds of queries of the classes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.ops import rational_adapter
from tests.support import assert_within_budget, problem

from .support import needs_extension, num_threads

pytestmark = needs_extension

NO_GRADIENT = {
    "official": AdapterConfig.official(64),
    "one head": AdapterConfig.paper(64, softmax="matrix", bias=True),
    "without the image query": AdapterConfig.official(64, queries=("text", "rational")),
}
"""Configurations whose query kinds share one product with the values where no gradient is wanted."""


# 1: a single class; 128, 129: a last block of queries of one or of all columns; 397: several blocks of queries and of
# keys; 1024, 1025: the last size that is merged, and the first that is not.
@pytest.mark.parametrize("name", NO_GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "classes"), [(2, 1), (5, 37), (1, 128), (3, 129), (2, 397), (1, 1024), (1, 1025)])
def test_outputs_without_gradients(name: str, batch: int, classes: int, dtype: torch.dtype) -> None:
    if classes > 1000 and (dtype != torch.float64 or name != "one head"):
        pytest.skip("one type and one head show where the limit lies")
    config = NO_GRADIENT[name]
    inputs = problem(config, batch, classes, dtype)
    exact, plain = (outputs_without_gradients(config, inputs, t, "reference") for t in (torch.float64, dtype))
    with num_threads(3):
        fast = outputs_without_gradients(config, inputs, dtype, "cpu")
    if dtype == torch.float64:
        for key, value in exact.items():
            torch.testing.assert_close(fast[key], value, rtol=1e-9, atol=1e-12)
    else:
        assert_within_budget(exact, plain, fast, dtype)


def outputs_without_gradients(
    config: AdapterConfig, inputs: tuple[Tensor, Tensor, dict[str, Tensor]], dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    image, text, parameters = inputs
    parameters = {key: value.to(dtype) for key, value in parameters.items()}
    with torch.no_grad():
        output = rational_adapter(
            image.to(dtype), text.to(dtype), 20.0, parameters, config,
            penalty="l2", return_mask=True, backend=backend,
        )  # fmt: skip
    assert output.penalty is not None
    assert output.mask is not None
    return {"logits": output.logits, "penalty": output.penalty, "mask": output.mask}


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_results_without_gradients_depend_on_the_image_alone(name: str) -> None:
    """Neither the number of threads nor the other images change a bit; an image with NaN spoils its own results."""
    config = NO_GRADIENT[name]
    image, text, parameters = problem(config, 5, 290, torch.float32)

    def logits(images: Tensor, threads: int) -> Tensor:
        with torch.no_grad(), num_threads(threads):
            return rational_adapter(images, text, 20.0, parameters, config, backend="cpu").logits

    usual = logits(image, 2)
    assert torch.equal(logits(image, 1), usual)
    assert torch.equal(logits(image, 7), usual)
    assert torch.equal(logits(image[3:4], 3), usual[3:4])
    image[2] = torch.nan
    dirty = logits(image, 3)
    assert bool(dirty[2].isnan().all())
    assert torch.equal(dirty[[0, 1, 3, 4]], usual[[0, 1, 3, 4]])


# The scores of one kind, or of one block of queries or of keys, exceed all others by more than e^x can express.
@pytest.mark.parametrize("name", ["official", "one head"])
@pytest.mark.parametrize("factors", [(300, 1), (1, 300), (3000, 3000)])
def test_large_scores_without_gradients(name: str, factors: tuple[float, float]) -> None:
    config, dtype = NO_GRADIENT[name], torch.float32
    image, text, parameters = problem(config, 1, 290, dtype)
    for role, factor in zip(("q_proj2", "q_proj3"), factors, strict=True):
        for kind in ("weight", "bias"):
            parameters[f"{role}.{kind}"] = factor * parameters[f"{role}.{kind}"]
    for factor in (1, 100):
        text[-1] *= factor
        inputs = (image, text, parameters)
        exact, plain = (outputs_without_gradients(config, inputs, t, "reference") for t in (torch.float64, dtype))
        fast = outputs_without_gradients(config, inputs, dtype, "cpu")
        assert all(bool(value.isfinite().all()) for value in fast.values())
        assert_within_budget(exact, plain, fast, dtype, roundings=32)
