"""The gradients of the features are the same sums in however many groups the images are divided."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rada_fast.kernels import rational_projections_backward as launches
from rada_fast.kernels.rational_projections import ProjectionBuffers

EPISODES, IMAGES, CLASSES, WIDTH, SCALE = 3, 3, 20, 32, 9.0
BATCH = EPISODES * IMAGES


@pytest.fixture(autouse=True)
def _no_remembered_launches() -> Iterator[None]:
    launches._backward_launches.cache_clear()
    yield
    launches._backward_launches.cache_clear()


# One tile holds all classes, so an episode is no group: these are groups of nine images, of five and four, and of one.
@pytest.mark.parametrize(("programs", "groups"), [(1, 1), (2, 2), (528, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_of_images_in_groups(
    dtype: torch.dtype, programs: int, groups: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "PROGRAMS", programs)
    assert -(-BATCH // launches.images_of_a_group(BATCH, 1)) == groups
    torch.manual_seed(0)
    f, t = torch.randn(BATCH, WIDTH).to(dtype), torch.randn(CLASSES, WIDTH).to(dtype)
    roles = ("key", "value", "rational", "text", "image")
    weights = {role: torch.randn(EPISODES, WIDTH, WIDTH).to(dtype) for role in roles}
    keys, values, rational, text, weighted = torch.randn(5, BATCH, CLASSES, WIDTH).to(dtype)
    query = torch.randn(BATCH, WIDTH)

    dimage, dtext = launches.rational_projections_backward(
        f.to(device), t.to(device), torch.tensor(SCALE, device=device),
        {role: value.to(device) for role, value in weights.items()},
        ProjectionBuffers(*(value.to(device) for value in (keys, values, rational, text, query))),
        weighted.to(device), scale_factor=1.0, episodes=EPISODES,
    )  # fmt: skip

    w = {role: value.double().repeat_interleave(IMAGES, 0) for role, value in weights.items()}
    through_keys, through_values, through_rational, through_text = (
        gradient.double() @ w[role] for gradient, role in zip((keys, values, rational, text), roles, strict=False)
    )
    drational = SCALE * (through_keys + through_values + through_rational) + weighted.double()
    root = SCALE**0.5
    wanted_image = (drational * t.double()).sum(1) + root * (query.double()[:, None] @ w["image"])[:, 0]
    wanted_text = (drational * f.double()[:, None]).sum(0) + root * through_text.sum(0)
    for found, wanted in ((dimage, wanted_image), (dtext, wanted_text)):
        assert found.dtype == dtype
        error = (found.cpu().double() - wanted).norm() / wanted.norm()
        # The sums are in float32, and only the result is rounded.
        assert error <= (2**-8 if dtype == torch.bfloat16 else 2e-6)


def test_groups_are_as_many_as_fill_a_device_and_none_is_empty() -> None:
    sizes = {(1, 16): 1, (6, 64): 1, (64, 32): 4, (64, 256): 32, (64, 265): 64, (64, 1000): 64, (1000, 16): 31}
    assert {given: launches.images_of_a_group(*given) for given in sizes} == sizes
