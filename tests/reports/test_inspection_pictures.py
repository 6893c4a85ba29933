"""The pictures of an inspection draw any name, and their titles say what they show."""

from __future__ import annotations

import os
from io import BytesIO

import pytest
from matplotlib.figure import Figure

from rada_fast.reports.inspection_pictures import averaged_classes, shown_name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"cat/bad\xff.png"), r"cat/bad\udcff.png"),
        ("a\nb  c", "a b c"),
        ("$x^2$", r"\$x^2\$"),
        ("x" * 31, "x" * 29 + "…"),
    ],
)
def test_any_name_can_be_drawn(name: str, shown: str) -> None:
    assert shown_name(name) == shown
    figure = Figure()
    figure.suptitle(shown_name(name))
    figure.savefig(BytesIO(), format="png")


def test_the_title_of_the_means_says_which_classes_are_shown() -> None:
    assert averaged_classes(34, 34, 34) == "all classes"
    assert averaged_classes(34, 34, 40) == "the 34 classes of 40 with images whose masks were computed"
    assert averaged_classes(40, 60, 80) == "the 40 classes that change most"
