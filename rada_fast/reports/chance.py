"""The check that zero-shot answers are better than guesses, and the likely cause where they are not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_IMAGES = 100
"""With fewer images a fault cannot be told from bad luck, so that nothing is said about them."""
SIGNIFICANCE = 0.01
"""Guesses pass for better than guesses with at most this probability."""
USEFUL = 0.25
"""Answers count as guesses only if they are surely right less often than a useful model's: this part of the way from
guesses to perfect answers. A hundred images of two classes alone could not tell 60 % from guesses."""
COLLAPSED = 0.9
"""If one class is the answer to more than this part of the images, all images look alike to the model."""


def binomial_tail(hits: int, trials: int, probability: float) -> float:
    """Return P(X >= hits) for X ~ Binomial(trials, probability), computed in logarithms."""
    if hits <= 0:
        return 1.0
    if probability in (0.0, 1.0):
        return probability
    log_p, log_q = math.log(probability), math.log1p(-probability)
    total = math.lgamma(trials + 1)
    return min(1.0, math.fsum(
        math.exp(total - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q)
        for k in range(hits, trials + 1)
    ))  # fmt: skip


def better_than_guesses(hits: int, images: int, num_classes: int) -> bool:
    """Return whether `hits` right answers are more than guesses among K classes give (level SIGNIFICANCE)."""
    return binomial_tail(hits, images, 1 / num_classes) < SIGNIFICANCE


def worse_than_useful(hits: int, images: int, num_classes: int) -> bool:
    """Return whether `hits` right answers are fewer than a useful model gives (level SIGNIFICANCE; see USEFUL)."""
    useful = 1 / num_classes + USEFUL * (1 - 1 / num_classes)
    return 1 - binomial_tail(hits + 1, images, useful) < SIGNIFICANCE


def fault_of_answers(labels: Tensor, answers: Tensor, names: Sequence[str]) -> str | None:
    """Say what is wrong with zero-shot answers that are no better than guesses, and what the likely cause is.

    labels, answers: the true and the predicted class of each image, (N,) int64.
    names: the names of the K classes in label order.

    Returns None where the answers are better than guesses, or the images are too few to say so.
    """
    images, num_classes = len(labels), len(names)
    hits = int((labels == answers).sum())
    if images < MIN_IMAGES or num_classes < 2:
        return None
    order, right = _best_order(labels, answers, names)
    # A confusion of the order may leave some labels in their places, so that some answers are right all the same.
    confused = right > 2 * hits and better_than_guesses(right, images, num_classes)
    guessed = worse_than_useful(hits, images, num_classes) and not better_than_guesses(hits, images, num_classes)
    if not confused and not guessed:
        return None
    examples, explained = _consistent_confusion(labels, answers, names)
    (most, count), *_ = Counter(answers.tolist()).most_common(1)
    if confused and right >= explained / 2:
        cause = f"Likely cause: {order}; otherwise {right} answers would be right."
    elif count > COLLAPSED * images:
        cause = (
            f"Likely cause: {count} answers are {names[most]!r}, so that all images look alike to the model; its "
            "weights may be untrained, or the preprocessing may not be its own."
        )
    elif examples:
        cause = (
            "Likely cause: the names of the classes are in another order than their labels, because the model tells "
            f"the classes apart under other names: {examples}."
        )
    else:
        cause = (
            "Likely causes: weights that are untrained or belong to another model, class names or templates that do "
            "not describe the images, or features of images and texts from different models."
        )
    expected = f"guesses among {num_classes} classes would make about {images / num_classes:.3g}"
    return f"{hits} of {images} zero-shot answers are right, where {expected}. {cause}"


def _best_order(labels: Tensor, answers: Tensor, names: Sequence[str]) -> tuple[str, int]:
    """Return the usual confusion of order that makes most answers right, and how many it makes right."""
    fitting = {
        description: int((expected[labels] == answers).sum()) for description, expected in _orders(names).items()
    }
    return max(fitting.items(), key=lambda one: one[1], default=("", 0))


def _orders(names: Sequence[str]) -> dict[str, Tensor]:
    """Return usual confusions of order, by description: the class (K,) that each label's images are taken for."""
    count = len(names)
    numbers = torch.arange(count)
    # The place of each number among 0 ... K - 1 when they are sorted as text: 0, 1, 10, 100, ...
    as_text = torch.tensor(sorted(range(count), key=str))
    by_name = torch.tensor(sorted(range(count), key=lambda label: _natural(names[label])))
    orders = {
        "the labels count numbered folders in the order of text (0, 1, 10, 100, ...), the names in that of numbers": (
            as_text
        ),
        "the names count numbered folders in the order of text (0, 1, 10, 100, ...), the labels in that of numbers": (
            as_text.argsort()
        ),
        "the labels begin with 1, the names with 0": (numbers - 1) % count,
        "the labels begin with 0, the names with 1": (numbers + 1) % count,
        "the labels are in the alphabetical order of the names, the names are not": by_name,
        "the names are in alphabetical order, the labels are not": by_name.argsort(),
        "the names are in the reverse order of the labels": count - 1 - numbers,
    }
    return {description: order for description, order in orders.items() if not torch.equal(order, numbers)}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", name)]


def _consistent_confusion(labels: Tensor, answers: Tensor, names: Sequence[str]) -> tuple[str, int]:
    """Return examples of classes that are taken for others, and how many labels the answers determine.

    Half of the images decide which class stands for which answer; the other half decides whether that holds. Returns
    ("", 0) if it does not.
    """
    half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % 2 == 0
    best = _most_frequent(answers[half].tolist(), labels[half].tolist())
    rest = list(zip(answers[~half].tolist(), labels[~half].tolist(), strict=True))
    right = sum(best.get(answer) == label for answer, label in rest)
    # Guesses that know the commonest class are right as often as it occurs.
    commonest = max(Counter(labels.tolist()).values()) / len(labels)
    if binomial_tail(right, len(rest), commonest) >= SIGNIFICANCE:
        return "", 0
    pairs = Counter((label, answer) for answer, label in rest if best.get(answer) == label and answer != label)
    examples = ", ".join(f"{names[a]!r} is taken for {names[b]!r}" for (a, b), _ in pairs.most_common(3))
    return examples, 2 * right


def _most_frequent(keys: Sequence[int], values: Sequence[int]) -> dict[int, int]:
    """Return the commonest value of each key."""
    counts: dict[int, Counter[int]] = {}
    for key, value in zip(keys, values, strict=True):
        counts.setdefault(key, Counter())[value] += 1
    return {key: count.most_common(1)[0][0] for key, count in counts.items()}
