"""The projection of rational matrices into a plane agrees with the matrices written out."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.reports import projection
from rada_fast.reports.projection import inner_products, principal_components, project


def test_inner_products_are_those_of_the_matrices_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BLOCK_ELEMENTS", 2 * 7 * 4)  # two classes at once
    torch.manual_seed(0)
    images, text, mask = (
        normalize(torch.randn(7, 4), dim=-1),
        normalize(torch.randn(5, 4), dim=-1),
        torch.randn(7, 5, 4),
    )
    for given, matrices in ((None, images[:, None] * text), (mask, mask * images[:, None] * text)):
        flat = matrices.flatten(1).double()
        torch.testing.assert_close(inner_products(images, text, given), flat @ flat.T, rtol=0, atol=1e-6)


def test_principal_components_have_the_distances_of_the_points() -> None:
    torch.manual_seed(0)
    points = torch.randn(9, 3, dtype=torch.float64)
    found = torch.from_numpy(principal_components(points @ points.T, 5))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points))
    assert found.var(dim=0).tolist() == sorted(found.var(dim=0).tolist(), reverse=True)
    assert found.shape == (9, 5)
    assert principal_components(torch.ones(1, 1, dtype=torch.float64), 2).tolist() == [[0, 0]]


def test_without_scikit_learn_the_components_are_drawn_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "find_spec", lambda name: None)
    points = torch.tensor([[0.0, 0], [0, 1], [5, 0], [5, 1], [0, 2], [9, 9]], dtype=torch.float64)
    found = project(points @ points.T, torch.tensor([0, 0, 1, 1, 1, 2]), perplexity=30, seed=0)
    assert "pip install 'rada_fast[inspect]'" in found.method
    # The nearest image of (0, 2) is of another class, and the class of (9, 9) has no other image.
    assert found.same_class == pytest.approx(4 / 5)
    assert project(points[:1] @ points[:1].T, torch.tensor([0]), perplexity=30, seed=0).same_class is None


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_t_sne_keeps_groups_together_and_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    centres = torch.eye(3, dtype=torch.float64).repeat_interleave(6, dim=0)
    points, labels = 10 * centres + 0.1 * torch.randn(18, 3, dtype=torch.float64), torch.arange(3).repeat_interleave(6)
    found, again = (project(points @ points.T, labels, perplexity=30, seed=1) for _ in range(2))
    assert found.method == "t-SNE, perplexity 5.67"
    assert np.array_equal(found.points, again.points)
    places = torch.from_numpy(found.points)
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(dim=1)
    assert torch.equal(labels[nearest], labels)
