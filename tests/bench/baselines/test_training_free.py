"""ZERO, MTA and VTE agree with their equations, written out in loops and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from rada_fast.bench.baselines.training_free import (
    by_confidence,
    mean_shift,
    most_confident,
    vision_text_ensemble,
    zero,
)

SCALE = 20.0


def drawn(views: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw features of views that lie near one another, and of classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 16, generator=generator) + 0.7 * torch.randn(views, 16, generator=generator)
    text = torch.randn(classes, 16, generator=generator)
    return normalize(features.double(), dim=-1), normalize(text.double(), dim=-1)


def entropies(logits: Tensor) -> list[float]:
    return [-math.fsum(p * math.log(p) for p in row if p > 0) for row in logits.softmax(dim=-1).tolist()]


def test_confident_views_are_those_of_lowest_entropy() -> None:
    features, text = drawn(30, 7)
    logits = SCALE * features @ text.T
    expected = sorted(range(30), key=entropies(logits).__getitem__)
    assert by_confidence(logits).tolist() == expected
    assert most_confident(logits, 0.1).tolist() == expected[:3]
    assert most_confident(logits[:5], 0.1).tolist() == [min(range(5), key=entropies(logits[:5]).__getitem__)]
    # Equal views stay in their order, so that every machine keeps the same ones.
    assert by_confidence(logits[:1].repeat(4, 1)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_zero_is_the_mean_prediction_at_a_vanishing_temperature(seed: int) -> None:
    features, text = drawn(40, 5, seed)
    logits = SCALE * features @ text.T
    kept = sorted(range(40), key=entropies(logits).__getitem__)[:12]
    marginal = (logits[kept] / 1e-9).softmax(dim=-1).sum(dim=0)
    votes = zero(features, text, SCALE, selection=0.3)
    assert (votes - marginal).sum() == pytest.approx(0.5)
    assert votes.floor().tolist() == marginal.round().tolist()
    best = [index for index, value in enumerate(marginal.tolist()) if value > marginal.max() - 0.5]
    assert int(votes.argmax()) in best


def test_zero_breaks_ties_by_the_next_most_confident_view() -> None:
    # Five views along the classes' own axes. The sharper a view, the lower its entropy.
    text = torch.eye(3, dtype=torch.float64)
    answers, sharpness = [0, 1, 2, 1, 0], [5.0, 4.0, 3.0, 2.0, 1.0]
    features = torch.tensor(sharpness, dtype=torch.float64)[:, None] * one_hot(torch.tensor(answers), 3)
    # Classes 0 and 1 have one vote each. The third view answers neither of them, and the fourth answers 1.
    assert zero(features, text, 1.0, selection=0.4).tolist() == [1.0, 1.5, 0.0]
    # Without another view, the most confident one decides.
    assert zero(features[:2], text, 1.0, selection=1.0).tolist() == [1.5, 1.0, 0.0]


def mta_in_loops(f: list[list[float]], text: list[list[float]]) -> list[float]:
    """Compute MTA's logits as its paper and its published code say, number by number."""
    count, width = len(f), len(f[0])

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        exponentials = [math.exp(value - top) for value in values]
        return [value / math.fsum(exponentials) for value in exponentials]

    predictions = [softmax([SCALE * dot(row, t) for t in text]) for row in f]
    affinity = [[dot(p, q) for q in predictions] for p in predictions]
    near = int(0.3 * (count - 1))
    bandwidth = []
    for p in range(count):
        distances = sorted(math.dist(f[p], f[q]) for q in range(count) if q != p)[:near]
        bandwidth.append(math.sqrt(0.5 * math.fsum(d * d for d in distances) / near))
    y, m = [1 / count] * count, list(f[0])

    def kernel() -> list[float]:
        return [math.exp(-(math.dist(f[p], m) ** 2) / (2 * bandwidth[p] ** 2)) for p in range(count)]

    for _ in range(5):
        density = kernel()
        for _ in range(5):
            y_before = y
            y = softmax([(density[p] + 4 * dot(affinity[p], y)) / 0.2 for p in range(count)])
            if math.dist(y, y_before) < 1e-6:
                break
        for _ in range(5):
            m_before = m
            weights = [a * b for a, b in zip(y, kernel(), strict=True)]
            m = [math.fsum(weights[p] * f[p][c] for p in range(count)) for c in range(width)]
            m = [value / math.hypot(*m) for value in m]
            if math.dist(m, m_before) < 1e-6:
                break
    return [SCALE * dot(m, t) for t in text]


@pytest.mark.parametrize(("views", "classes"), [(5, 3), (12, 2), (23, 6)])
def test_mta_is_its_equations(views: int, classes: int) -> None:
    features, text = drawn(views, classes, views)
    expected = torch.tensor(mta_in_loops(features.tolist(), text.tolist()), dtype=torch.float64)
    torch.testing.assert_close(mean_shift(features, text, SCALE), expected, rtol=1e-8, atol=1e-8)


def test_mta_leaves_views_out_that_lie_apart() -> None:
    features, text = drawn(20, 4)
    together = normalize(features[:1] + 0.05 * features, dim=-1)
    expected = mean_shift(together, text, SCALE)
    apart = mean_shift(torch.cat([together, -together[:2]]), text, SCALE)
    torch.testing.assert_close(apart, expected, rtol=0.02, atol=0.05)
    # Equal views have no distance between them, and one view or two have no neighbours to take a bandwidth from.
    for count in (1, 2, 8):
        equal = mean_shift(features[:1].repeat(count, 1), text, SCALE)
        torch.testing.assert_close(equal, SCALE * features[0] @ text.T)


def test_vte_is_the_mean_feature_of_the_confident_views() -> None:
    features, text = drawn(30, 7)
    order = sorted(range(30), key=entropies(SCALE * features @ text.T).__getitem__)
    mean = [math.fsum(features[view, c].item() for view in order[:3]) / 3 for c in range(16)]
    expected = [SCALE * math.fsum(a * b for a, b in zip(mean, row, strict=True)) for row in text.tolist()]
    torch.testing.assert_close(vision_text_ensemble(features, text, SCALE).tolist(), expected)
    values = vision_text_ensemble(features, text, SCALE, selection=1.0)
    torch.testing.assert_close(values, SCALE * features.mean(dim=0) @ text.T)
