"""Two commits are compared in turn, and the test of a difference is exact."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from benchmarks import compare


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 2**6),  # all of one sign
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 2 / 2**10),
        ([-1, 2, 3, 4, 5, 6], 4 / 2**6),
        ([1, -1], 1.0),
        ([0, 0], 1.0),
    ],
)
def test_the_signed_rank_test_has_the_probabilities_of_its_tables(differences: list[float], expected: float) -> None:
    assert compare.signed_rank_probability(differences) == pytest.approx(expected)


def test_equal_differences_are_tested_exactly_too() -> None:
    differences = [1.0, 1.0, -1.0, 2.0, 3.0, 3.0, -0.5]
    sizes = sorted(map(abs, differences))
    ranks = {size: sizes.index(size) + (1 + sizes.count(size)) / 2 for size in sizes}
    own = [ranks[abs(one)] for one in differences]
    middle = sum(own) / 2
    seen = abs(sum(rank for rank, one in zip(own, differences, strict=True) if one > 0) - middle)
    sums = [sum(itertools.compress(own, signs)) for signs in itertools.product([0, 1], repeat=len(own))]
    expected = sum(abs(total - middle) >= seen for total in sums) / len(sums)
    assert compare.signed_rank_probability(differences) == pytest.approx(expected)


def test_the_interval_is_that_of_the_tables() -> None:
    # With ten pairs the table of the test says 8, so that the ninth mean from each end of the 55 is a bound.
    differences = [float(2**at) for at in range(10)]
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2))
    _, low, high = compare.interval(differences)
    assert (low, high) == (means[8], means[-9])
    assert compare.interval(differences[:5])[1:] == (-math.inf, math.inf)


def test_probabilities_are_corrected_for_their_number() -> None:
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_sides_take_turns_and_a_difference_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    base, changed = Path("base"), Path("changed")
    order: list[str] = []

    def run(side: Path) -> compare.Observations:
        order.append(side.name)
        drift = 1 + 0.1 * len(order)  # a machine that slows down
        own = {("case", "rada_fast"): drift * (1.0 if side == base else 0.5), ("case", "pytorch"): 3.0}
        return own | ({("new", "rada_fast"): 1.0} if side == changed else {})

    observations = compare.alternate(base, changed, 8, run)
    assert order == ["base", "changed", "changed", "base"] * 4
    found = compare.compared(*observations)
    ours, plain = found["case", "rada_fast"], found["case", "pytorch"]
    assert ours.verdict == "better"
    assert ours.low < 2 < ours.high
    assert (plain.verdict, plain.ratio) == ("no difference shown", 1.0)
    lines = compare.lines_of(found, "best_ms")
    assert "better" in lines[2]
    assert "no difference shown" in lines[3]
    assert compare.missing(*observations) == ["only in changed: new, rada_fast"]


def test_a_base_that_is_no_commit_is_refused() -> None:
    with pytest.raises(SystemExit, match="--base must be a commit, got 'no-such-commit'"):
        compare.unpacked("no-such-commit")
