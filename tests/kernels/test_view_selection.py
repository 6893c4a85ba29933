"""The kernels that keep views agree with the products and the selection of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.kernels.view_selection import KeptViews, kept_views
from rada_fast.reference.view_selection import select_views

SCALE = 100.0
# Views: fewer than a tile, one that is not full, and more than the second launch compares at once. Classes: one, one
# tile, and several of which the last is not full. Widths: one block and several.
SIZES = {
    "one view": (1, 1, 1, 32, 1),
    "an episode": (2, 20, 37, 64, 3),
    "many views": (1, 70, 33, 32, 9),
    "all views": (3, 5, 32, 96, 5),
}


def problem(episodes: int, views: int, classes: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(views)
    shapes = ((episodes, views, width), (classes, width))
    drawn = (torch.randn(*shape, generator=generator) for shape in shapes)
    own, text = (normalize(value, dim=-1).to(dtype) for value in drawn)
    # These views have equal predictions: their order is that of the views.
    own[:, views // 2] = own[:, 0]
    return own, text


def run(views: Tensor, text: Tensor, count: int, device: str, precision: str = "ieee") -> KeptViews:
    scale = torch.full((), SCALE, device=device)
    found = kept_views(views.to(device), text.to(device), scale, count, precision=precision)
    return KeptViews(*(value.cpu() for value in found))


def expected(views: Tensor, text: Tensor, count: int) -> KeptViews:
    """Return the results in float64."""
    logits = SCALE * views.double() @ text.double().T  # (E, V, K)
    indices, _ = select_views(logits, count)
    kept = views.gather(1, indices[..., None].expand(-1, -1, views.shape[2]))
    return KeptViews(kept, views[:, 0], logits[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIZES)
def test_kept_views_are_those_of_the_least_entropies(name: str, dtype: torch.dtype, device: str) -> None:
    episodes, views, classes, width, count = SIZES[name]
    own, text = problem(episodes, views, classes, width, dtype)
    found, exact = run(own, text, count, device), expected(own, text, count)
    assert torch.equal(found.originals, exact.originals)
    assert torch.equal(found.kept, exact.kept)
    # Sums of D products of numbers up to 1 are scaled by s, and rounded once to the features' type.
    torch.testing.assert_close(
        found.logits.double(), exact.logits, rtol=torch.finfo(dtype).eps, atol=SCALE * width * 2**-24
    )


def test_float32_products_on_tensor_cores_keep_the_same_views(device: str) -> None:
    own, text = problem(2, 20, 37, 64, torch.float32)
    found, exact = run(own, text, 5, device, "tf32x3"), expected(own, text, 5)
    assert torch.equal(found.kept, exact.kept)
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=2**-20, atol=SCALE * 64 * 2**-24)


def test_an_episode_does_not_depend_on_the_others(device: str) -> None:
    own, text = problem(3, 20, 40, 64, torch.float32)
    together = run(own, text, 4, device, "tf32x3")
    for index in range(3):
        alone = run(own[index : index + 1], text, 4, device, "tf32x3")
        for value, single in zip(together, alone, strict=True):
            assert torch.equal(value[index : index + 1], single)


def test_almost_certain_views_are_in_their_order(device: str) -> None:
    """Their entropies are below the spacing of the numbers near 1."""
    views = torch.zeros(1, 8, 32)
    gaps = torch.tensor([0.4, 0.3, 0.36, 0.34, 0.38, 0.32, 0.31, 0.35])
    views[0, :, 0] = gaps
    text = torch.eye(32)[:2]
    found = run(views, text, 8, device)
    assert torch.equal(found.kept[0, :, 0], gaps.sort(descending=True).values)


def views_with_gaps(*gaps: list[float]) -> tuple[Tensor, Tensor]:
    """Return views and 32 classes, of which the first is the likeliest. The others' logits are that much below it, and
    those without a gap far below."""
    views = torch.full((1, len(gaps), 32), -1.5)
    views[..., 0] = 0.0
    for view, own in enumerate(gaps):
        views[0, view, 1 : 1 + len(own)] = -torch.tensor(own) / SCALE
    return views, torch.eye(32)


@pytest.mark.parametrize(
    "gaps",
    [
        # The sums over the other classes are 2.1e-9 and 1.8e-9. Their logarithm decides the order.
        ([20.0], [23.5613] * 30),
        # The sums are 0.49 and 0.62, and the entropies 0.66613 and 0.66607.
        ([0.733969, 4.605170], [0.471945]),
    ],
    ids=["small", "large"],
)
def test_entropies_of_nearly_equal_views_are_in_their_order(gaps: tuple[list[float], ...], device: str) -> None:
    views, text = views_with_gaps(*gaps)
    _, entropies = select_views(SCALE * views.double() @ text.double().T, 2)
    assert 1e-5 < float(1 - entropies[0, 1] / entropies[0, 0]) < 1e-2
    found = run(views, text, 2, device)
    assert torch.equal(found.kept, views.flip(1))


def test_the_likeliest_class_may_lie_in_any_tile_of_classes(device: str) -> None:
    """Each of three tiles has a larger largest logit than the one before, or in every other view a smaller one."""
    slopes = 4 + 0.05 * torch.arange(8)
    views = slopes[:, None] * torch.linspace(-1, 0, 96) / SCALE
    views[1::2] = views[1::2].flip(1)
    found = run(views[None], torch.eye(96), 8, device)
    assert torch.equal(found.kept, views[None].flip(1))


def test_the_second_likeliest_class_counts_in_whatever_tile_it_lies(device: str) -> None:
    """The two likeliest classes lie in two tiles: the likelier one in the second, or in every other view in the first.

    All other classes are so unlikely that each entropy is that of these two.
    """
    views = torch.full((1, 8, 64), -1.5)
    views[..., 40] = 0.0
    views[0, :, 3] = -torch.arange(1.0, 2.0, 0.125) / SCALE
    views[:, 1::2] = views[:, 1::2].flip(-1)
    found = run(views, torch.eye(64), 8, device)
    assert torch.equal(found.kept, views.flip(1))


def test_views_with_nan_come_last(device: str) -> None:
    own, text = problem(2, 20, 40, 32, torch.float32)
    own[0, 3], own[0, 7], own[1] = torch.nan, torch.inf, torch.nan
    found = run(own, text, 20, device)
    clean, _ = select_views(SCALE * own[:1].double() @ text.double().T, 18)
    assert torch.equal(found.kept[0, :18], own[0, clean[0]])
    assert bool(found.kept[0, 18].isnan().all())
    assert bool(found.kept[0, 19].isinf().all())
    assert bool(found.kept[1].isnan().all())
