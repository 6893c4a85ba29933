"""The first step's launch gives the output projection its gradients, and exact zeros to all other parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rada_fast.kernels.output_projection_gradients import output_projection_gradients
from rada_fast.kernels.parameter_gradients import ROLE_ORDER

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 20.0


class Case(NamedTuple):
    """Hold the sizes and types of one launch.

    images: those of one episode. dtype, features: the types of the products, and of f, T and the gradients of logits
    and masks. given: the results that have gradients.
    """

    episodes: int
    images: int
    classes: int
    width: int
    dtype: torch.dtype
    features: torch.dtype
    bias: bool = True
    given: tuple[str, ...] = ("dlogits", "dmask")
    roles: tuple[str, ...] = ROLE_ORDER


CASES = {
    "one row": Case(1, 1, 1, 32, F32, F32),
    "more classes than a step": Case(2, 3, 17, 32, F32, F32, given=("dlogits",)),
    "many classes in bfloat16": Case(3, 2, 65, 32, BF16, BF16),
    "biases of two images at once": Case(2, 2, 129, 64, BF16, BF16, given=("dlogits",)),
    "biases of many images at once": Case(2, 5, 33, 96, BF16, BF16),
    "no biases": Case(1, 3, 17, 64, F32, F32, bias=False),
    "a gradient of the mask alone": Case(2, 2, 9, 32, F16, F16, given=("dmask",)),
    "features in float32": Case(2, 2, 40, 64, BF16, F32),
    "the output projection alone": Case(1, 2, 21, 128, F32, F32, roles=("output",)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_an_output_projection_of_zeros(device: str, name: str) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batch = case.episodes * case.images
    rows = (batch, case.classes, case.width)

    def draw(*shape: int, dtype: torch.dtype = case.features) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    image, text = draw(batch, case.width), draw(case.classes, case.width)
    results: dict[str, Tensor | None] = {"dlogits": draw(batch, case.classes), "dmask": draw(*rows)}
    results = {key: value if key in case.given else None for key, value in results.items()}
    attended = draw(*rows, dtype=case.dtype)

    # The exact gradients: each episode's own sum over its rows.
    r = image.double()[:, None] * text.double()
    da = torch.zeros(rows, dtype=torch.float64)
    if (dlogits := results["dlogits"]) is not None:
        da += SCALE * dlogits.double()[..., None] * r
    if (dmask := results["dmask"]) is not None:
        da += dmask.double()
    da, o = (value.reshape(case.episodes, -1, case.width) for value in (da, attended.double()))

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    shape = (case.episodes, case.width, case.width)
    weights, biases = output_projection_gradients(
        image.to(device), text.to(device), torch.tensor(SCALE, device=device), attended.to(device),
        moved(results["dlogits"]), moved(results["dmask"]),
        {role: torch.zeros(shape, dtype=case.features, device=device) for role in case.roles},
        bias=case.bias, dtype=case.dtype,
    )  # fmt: skip

    assert set(weights) == set(case.roles)
    assert set(biases) == (set(case.roles) if case.bias else set())
    # Two operands of a product are rounded, and the result.
    eps = 4 * torch.finfo(case.dtype).eps
    for found, exact in [(weights["output"], da.mT @ o)] + ([(biases["output"], da.sum(1))] if case.bias else []):
        assert (found.cpu().double() - exact).norm() <= eps * exact.norm()
    for role in case.roles:
        if role != "output":
            assert not weights[role].any()
            assert weights[role].shape == shape
            assert not case.bias or not biases[role].any()
    # An optimiser may change one gradient in place, as clipping does, so none lies in another's memory.
    spans = sorted(
        (value.data_ptr(), value.data_ptr() + value.nbytes) for value in (*weights.values(), *biases.values())
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
