"""The gradients of weights and biases are right for every number of rows that a step of the reduction may lack."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from rada_fast.kernels.parameter_gradients import ROLE_ORDER, Tile, parameter_gradients, remainder
from rada_fast.kernels.rational_projections import ProjectionBuffers

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 20.0


class Case(NamedTuple):
    """Hold the sizes and types of one launch. images: those of one episode; features: the type of f and T."""

    episodes: int
    images: int
    classes: int
    width: int
    dtype: torch.dtype
    features: torch.dtype
    roles: tuple[str, ...] = ROLE_ORDER
    tile: Tile | None = None
    bias: bool = True


TILE = Tile(32, 32, 32, 4, 3)
CASES = {
    "one row": Case(1, 1, 1, 32, BF16, BF16),
    "one class": Case(2, 3, 1, 64, F32, F32),
    "one image of steps and a short step": Case(1, 1, 139, 64, BF16, BF16),
    "images of steps and a short step": Case(1, 5, 71, 64, BF16, BF16, tile=TILE),
    "images of whole steps": Case(2, 3, 64, 32, F16, F16, tile=TILE, bias=False),
    "images of steps whose last one is not full": Case(1, 3, 90, 32, F32, F32),
    "images of less than a step": Case(2, 9, 11, 32, F32, F32),
    "features in float32": Case(2, 2, 40, 64, BF16, F32),
    "a width that few blocks divide": Case(1, 2, 33, 96, F16, F16),
    "the widest": Case(1, 2, 70, 1024, BF16, BF16, roles=("value",)),
    "more images than are added at once": Case(1, 6, 35, 32, BF16, BF16, roles=("text", "image"), bias=False),
    "the output projection alone": Case(3, 2, 37, 32, BF16, BF16, roles=("output",)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_rows_that_do_not_fill_the_steps(device: str, name: str) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    batch = case.episodes * case.images

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    image, text = (draw(rows, case.width, dtype=case.features) for rows in (batch, case.classes))
    gradients = {role: draw(batch, case.classes, case.width) for role in ROLE_ORDER if role != "image"}
    gradients["image"] = draw(batch, case.width, dtype=F32)
    attended = draw(batch, case.classes, case.width)
    lead = (case.episodes,) if case.episodes > 1 else ()
    weights, biases = parameter_gradients(
        image.to(device),
        text.to(device),
        torch.tensor(SCALE, device=device),
        attended.to(device) if "output" in case.roles else None,
        None
        if case.roles == ("output",)
        else ProjectionBuffers(
            **{name: gradients[role].to(device) for name, role in (("keys", "key"), ("values", "value"))},
            **{f"q_{role}": gradients[role].to(device) for role in ("rational", "text", "image")},
        ),
        gradients["output"].to(device),
        {role: torch.empty(*lead, case.width, case.width, dtype=case.features, device=device) for role in case.roles},
        bias=case.bias,
        scale_factor=1.0,
        precision="tf32x3",
        tile=case.tile,
    )
    f, t = image.double().unsqueeze(1), text.double()
    rational = SCALE * f * t
    inputs = {"text": SCALE**0.5 * t.expand_as(rational), "image": SCALE**0.5 * f, "output": attended.double()}
    assert set(weights) == set(case.roles)
    assert set(biases) == (set(case.roles) if case.bias else set())
    for role in case.roles:
        dy = gradients[role].double().reshape(case.episodes, -1, case.width)
        x = inputs.get(role, rational).reshape(case.episodes, -1, case.width)
        # Operands are rounded to the type of the products, and results to that of the weight.
        eps = torch.finfo(case.dtype).eps
        for found, exact in [(weights[role], dy.mT @ x)] + ([(biases[role], dy.sum(1))] if case.bias else []):
            exact = exact.reshape(found.shape)
            assert (found.cpu().double() - exact).norm() <= 2 * eps * exact.norm(), role


def test_the_text_querys_gradients_are_rounded_after_all_images_are_added(device: str) -> None:
    """Fifteen terms of a half are each lost beside the first one, 256, if the sum has the eight bits of bfloat16."""
    images, classes, width = 16, 3, 32
    gradient = torch.full((images, classes, width), 0.5, dtype=BF16)
    gradient[0] = 256.0
    text = torch.eye(classes, width, dtype=BF16)
    weights, _ = parameter_gradients(
        torch.ones(images, width, dtype=BF16, device=device),
        text.to(device),
        torch.tensor(1.0, device=device),
        None,
        ProjectionBuffers(keys=None, values=None, q_rational=None, q_text=gradient.to(device), q_image=None),
        gradient.to(device),
        {"text": torch.empty(width, width, device=device)},
        bias=False,
        scale_factor=1.0,
    )
    wanted = torch.tensor(256 + 15 * 0.5).to(BF16).float()
    assert torch.equal(weights["text"].cpu()[:, :classes], wanted.expand(width, classes))


@pytest.mark.parametrize(
    ("classes", "rows", "expected"),
    [(1, 64, 16), (16, 64, 16), (17, 64, 32), (64, 64, 64), (65, 64, 16), (200, 64, 16), (1000, 64, 64), (5, 16, 16)],
)
def test_classes_that_are_left_over_take_a_step_of_a_power_of_two_rows(classes: int, rows: int, expected: int) -> None:
    assert remainder(classes, rows) == expected
