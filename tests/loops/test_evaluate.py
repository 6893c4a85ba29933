"""Answers are evaluated among the classes of the images, of which one can be several of the trained classes."""

from __future__ import annotations

import torch

from rada_fast.loops.evaluate import evaluate
from rada_fast.models.image_features import Features, Unreadable

NAMES = ("analog clock", "banana", "digital clock", "wok")


def test_each_of_the_classes_that_a_label_stands_for_is_right() -> None:
    images = Features(torch.eye(4), torch.tensor([1, 0, 1, 0]), ("a", "b", "c", "d"), (Unreadable("e", 1, "damaged"),))
    answers = torch.tensor([[0.0, 1, 9, 8], [3, 2, 1, 9], [7, 8, 1, 9], [9, 0, 0, 9]])
    records = evaluate(
        lambda part: answers, images, torch.eye(4), 1.0, names=NAMES, title="test", device=torch.device("cpu"),
        labels=[(1,), (0, 2)],
    )  # fmt: skip
    # Labels 0 and 1 of the images are banana, and either clock. A wok is none of the classes.
    assert [record["label"] for record in records] == [0, 1, 0, 1, 0]
    assert [record["adapted"][0] for record in records[:4]] == [0, 0, 1, 0]
    assert [record["zero_shot"][0] for record in records[:3]] == [0, 1, 0]
    assert all(3 not in record["adapted"][:2] and 2 not in record["adapted"][:2] for record in records[:4])
    assert answers[0].tolist() == [0, 1, 9, 8]
