"""Answers that are no better than guesses are noticed, and the likely cause is the right one."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from rada_fast.reports.chance import binomial_tail, fault_of_answers

NAMES = tuple(f"class {number:02}" for number in range(20))


def answers_to(expected: Tensor, *, right: float = 0.8, seed: int = 0) -> Tensor:
    """Return answers of which about this part are the expected ones and the others are guesses."""
    generator = torch.Generator().manual_seed(seed)
    guesses = torch.randint(len(NAMES), expected.shape, generator=generator)
    return torch.where(torch.rand(expected.shape, generator=generator) < right, expected, guesses)


LABELS = torch.arange(400) % len(NAMES)


def test_the_tail_of_the_binomial_distribution_is_exact() -> None:
    for trials, p in product((1, 7, 30), (0.0, 0.05, 0.5, 1.0)):
        for hits in range(trials + 1):
            exact = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(hits, trials + 1))
            assert binomial_tail(hits, trials, p) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("right", [0.1, 0.5, 1.0])
def test_answers_that_are_better_than_guesses_pass(right: float) -> None:
    assert fault_of_answers(LABELS, answers_to(LABELS, right=right), NAMES) is None


def test_guesses_seldom_pass() -> None:
    passed = sum(fault_of_answers(LABELS, answers_to(LABELS, right=0, seed=seed), NAMES) is None for seed in range(100))
    assert passed <= 5


@pytest.mark.parametrize(("num_classes", "right"), [(2, 0.7), (2, 0.65), (10, 0.3), (100, 0.17)])
def test_weak_models_are_not_stopped(num_classes: int, right: float) -> None:
    labels, generator = torch.arange(100) % num_classes, torch.Generator().manual_seed(0)
    names = tuple(f"class {number}" for number in range(num_classes))
    stopped = 0
    for _ in range(200):
        others = (labels + torch.randint(1, num_classes, labels.shape, generator=generator)) % num_classes
        answers = torch.where(torch.rand(100, generator=generator) < right, labels, others)
        stopped += fault_of_answers(labels, answers, names) is not None
    assert stopped <= 2


def test_few_images_and_a_single_class_are_not_judged() -> None:
    wrong = (LABELS + 7) % len(NAMES)
    assert fault_of_answers(LABELS[:99], wrong[:99], NAMES) is None
    assert fault_of_answers(LABELS * 0, LABELS * 0, NAMES[:1]) is None


@pytest.mark.parametrize(
    ("expected", "names", "cause"),
    [
        (LABELS * 0 + 3, NAMES, "answers are 'class 03', so that all images look alike"),
        ((LABELS + 1) % 20, NAMES, "labels begin with 0, the names with 1"),
        ((LABELS - 1) % 20, NAMES, "labels begin with 1, the names with 0"),
        (19 - LABELS, NAMES, "reverse order"),
        (torch.tensor(sorted(range(20), key=str))[LABELS], NAMES, "the labels count numbered folders in the order of"),
        (torch.tensor(sorted(range(20), key=str)).argsort()[LABELS], NAMES, "the names count numbered folders in the"),
        (torch.tensor(sorted(range(20), key="qwertyuiopasdfghjklz".__getitem__))[LABELS],
         tuple("qwertyuiopasdfghjklz"), "the labels are in the alphabetical order of the names"),
        ((7 * LABELS + 3) % 20, NAMES, "under other names: 'class"),
        (answers_to(LABELS, right=0), NAMES, "weights that are untrained or belong to another model"),
    ],
)  # fmt: skip
def test_the_likely_cause_is_the_fault_that_was_made(expected: Tensor, names: tuple[str, ...], cause: str) -> None:
    right = 0.95 if "look alike" in cause else 0.7
    found = fault_of_answers(LABELS, answers_to(expected, right=right, seed=1), names)
    assert found is not None
    assert cause in found


def test_two_classes_with_swapped_names_are_noticed() -> None:
    labels = torch.arange(120) % 2
    found = fault_of_answers(labels, 1 - labels, ("cat", "dog"))
    assert found is not None
    assert found.startswith("0 of 120 zero-shot answers are right")
