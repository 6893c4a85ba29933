"""The measures of a report agree with published values and with counting."""

from __future__ import annotations

import math

import pytest

from rada_fast.reports.measures import (
    calibration_bins,
    calibration_error,
    exact_interval,
    gain,
    paired_test,
    spread,
    student_probability,
    student_quantile,
    wilson,
)


def test_the_exact_interval_leaves_a_fortieth_on_either_side() -> None:
    # The published example of Clopper and Pearson's interval, and the closed forms at the ends.
    assert exact_interval(81, 263) == pytest.approx((25.27, 36.77), abs=0.01)
    assert exact_interval(0, 20) == pytest.approx((0.0, 100 * (1 - 0.025 ** (1 / 20))))
    assert exact_interval(20, 20) == pytest.approx((100 * 0.025 ** (1 / 20), 100.0))
    low, high = (end / 100 for end in exact_interval(3, 10))
    at_least = sum(math.comb(10, n) * low**n * (1 - low) ** (10 - n) for n in range(3, 11))
    at_most = sum(math.comb(10, n) * high**n * (1 - high) ** (10 - n) for n in range(4))
    assert (at_least, at_most) == pytest.approx((0.025, 0.025))


def test_wilson_interval() -> None:
    # Newcombe (1998), Table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert wilson(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)
    low, high = wilson(20, 20) or (0.0, 0.0)
    assert (low, high) == pytest.approx((83.89, 100.0), abs=0.01)
    assert high <= 100
    assert wilson(0, 0) is None


def test_a_gain_is_paired() -> None:
    # Agresti, Categorical Data Analysis: the approval of 1600 people before and after, -0.04 with (-0.06, -0.02). One
    # more change of each kind, among two more people, gives (87 - 151) / 1602 +- 1.96 sqrt(0.14697 / 1602).
    answers = [(True, True)] * 794 + [(True, False)] * 150 + [(False, True)] * 86 + [(False, False)] * 570
    found = gain(answers)
    assert found is not None
    assert found.mean == pytest.approx(-4.0)
    assert found.interval == pytest.approx((-5.872, -2.118), abs=1e-3)
    assert gain([]) is None


def test_few_images_that_agree_do_not_make_a_gain_certain() -> None:
    found = gain([(True, True)] * 4)
    # 0 +- 1.96 sqrt((1 + 1) / 6 / 6)
    assert found is not None
    assert found.mean == 0
    assert found.interval == pytest.approx((-46.20, 46.20), abs=0.01)
    one = gain([(False, True)])
    assert one is not None
    assert one.interval.low < 0 < one.interval.high == one.mean == 100


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=5e-5)
    assert student_probability(quantile, freedom) == pytest.approx(0.95, abs=1e-5)


def test_spread_over_seeds() -> None:
    found = spread([80.0, 82.0, 84.0])
    assert found is not None
    assert (found.seeds, found.mean, found.std) == (3, 82.0, 2.0)
    assert found.interval == pytest.approx((82 - 4.3027 * 2 / math.sqrt(3), 82 + 4.3027 * 2 / math.sqrt(3)), abs=1e-3)
    assert spread([80.0]) == (1, 80.0, None, None)
    assert spread([]) is None


def test_paired_test_is_exact_for_small_counts() -> None:
    assert paired_test(0, 0).p == 1
    # All five differing images in favour of one predictor: 2 / 2^5.
    assert paired_test(0, 5).p == pytest.approx(0.0625)
    assert paired_test(1, 7).p == pytest.approx(2 * (1 + 8) / 2**8)
    assert paired_test(4, 4).p == 1
    assert paired_test(4, 9) == paired_test(4, 9)._replace(method="exact binomial")


def test_paired_test_of_large_counts_goes_on_where_the_exact_one_ends() -> None:
    exact, approximate = paired_test(460, 540), paired_test(460, 541)
    assert approximate.method.startswith("chi-squared")
    assert approximate.p == pytest.approx(exact.p, rel=0.1)


def test_calibration_error_by_hand() -> None:
    # Two bins: (0.6, 0.6667] holds two answers of 0.65, one of them right; (0.9333, 1] holds two of 0.95, both right.
    answers = [(0.65, True), (0.65, False), (0.95, True), (0.95, True)]
    assert calibration_error(answers) == pytest.approx(100 * (2 * abs(0.5 - 0.65) + 2 * abs(1 - 0.95)) / 4)
    assert calibration_error([(1.0, True), (0.0, False)]) == 0
    assert calibration_error([]) is None


def test_bins_hold_their_upper_ends_and_every_answer_once() -> None:
    answers = [(0.0, False), (1 / 15, True), (1 / 15 + 1e-9, False), (0.99, True), (1.0, False)]
    bins = calibration_bins(answers)
    assert [one.answers for one in bins] == [2, 1, *[0] * 12, 2]
    assert bins[0].accuracy == 0.5
    assert bins[0].confidence == pytest.approx(1 / 30)
    assert bins[-1].confidence == pytest.approx(0.995)
    assert (bins[5].confidence, bins[5].accuracy) == (None, None)
    assert (bins[0].low, bins[-1].high) == (0, 1)
