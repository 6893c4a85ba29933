"""The answers in the records of images: which of them are right, and how many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rada_fast.runs.progress import Counts

ANSWERS = {"zero-shot": "zero_shot", "adapted": "adapted"}
"""The words for the two answers to an image, and the entries of its record that hold them."""


def answers_of(record: Mapping[str, Any]) -> dict[str, bool] | None:
    """Return whether the answers before and after adaptation were right, or None for an image of no known class.

    record: the record of an image. An unreadable image counts as a wrong answer.
    """
    if (label := record.get("label")) is None:
        return None
    return {title: label in record.get(name, [])[:1] for title, name in ANSWERS.items()}


def counts_of(records: Iterable[Mapping[str, Any]]) -> Counts:
    """Count the records of images, as the progress of a run shows them."""
    done, labelled, unreadable, right = 0, 0, 0, dict.fromkeys(ANSWERS, 0)
    for record in records:
        done += 1
        unreadable += record.get("status") == "unreadable"
        if (answers := answers_of(record)) is not None:
            labelled += 1
            for name, is_right in answers.items():
                right[name] += is_right
    return Counts(done, done, labelled, right if labelled else {}, unreadable)
