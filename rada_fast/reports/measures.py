"""The measures of a report: intervals of an accuracy and of a mean, a paired test, and the error of calibration.

All formulas are exact or stated, and need nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
"""The probability with which the intervals of a report contain the true value."""
ECE_BINS = 15
"""The number of bins of equal width over which the error of calibration is computed."""
MAX_EXACT = 1000
"""The largest number of differing answers for which the paired test is exact."""


class Interval(NamedTuple):
    """An interval that contains the true value with the probability CONFIDENCE."""

    low: float
    high: float


class Spread(NamedTuple):
    """A measure over several seeds.

    seeds: the number of seeds.
    mean: the mean over the seeds.
    std: the standard deviation of one seed (with n - 1 in the denominator), or None for a single seed.
    interval: the interval of the mean by Student's t, or None for a single seed.
    """

    seeds: int
    mean: float
    std: float | None = None
    interval: Interval | None = None


class PairedTest(NamedTuple):
    """McNemar's test of whether two predictors are right equally often.

    first_only, second_only: how many images only the first and only the second predictor gets right.
    p: the probability of counts at least as unequal if both are right equally often.
    method: the words that say how p was computed.
    """

    first_only: int
    second_only: int
    p: float
    method: str


class CalibrationBin(NamedTuple):
    """The answers whose confidence lies between two limits.

    low, high: the limits; the higher one belongs to the bin, the lower one to the bin before.
    answers: the number of answers.
    confidence: their mean confidence, from 0 to 1, or None without an answer.
    accuracy: the share of them that is right, or None without an answer.
    """

    low: float
    high: float
    answers: int
    confidence: float | None
    accuracy: float | None


class Gain(NamedTuple):
    """A change of accuracy on the same images, in percentage points, and its interval."""

    mean: float
    interval: Interval


def gain(answers: Iterable[tuple[bool, bool]]) -> Gain | None:
    """Return by how much a second predictor is more accurate than a first one, or None if there are no images.

    The interval is Wald's, adjusted for paired proportions (Bonett and Price, 2012): one image more is counted as
    gained and one as lost, so that a few images without a change do not give an interval of no width. With f images
    gained, g lost and n in all, p = (f + 1) / (n + 2) and q = (g + 1) / (n + 2), it is

        p - q +- z sqrt((p + q - (p - q)^2) / (n + 2))

    answers: whether the first and whether the second predictor is right, for each image.
    """
    differences = [second - first for first, second in answers]
    if not differences:
        return None
    total = len(differences) + 2
    gained, lost = (differences.count(one) + 1 for one in (1, -1))
    middle = (gained - lost) / total
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    reach = z * math.sqrt(((gained + lost) / total - middle**2) / total)
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    return Gain(100 * fmean(differences), Interval(100 * low, 100 * high))


def wilson(right: int, total: int) -> Interval | None:
    """Return Wilson's score interval of an accuracy, in percent, or None if there are no images.

    right: the number of right answers.
    total: the number of images.
    """
    if not total:
        return None
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = right / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = ((middle + sign * reach) / (1 + z * z / total) for sign in (-1, 1))
    # Without a wrong answer, rounding could put the end of the interval slightly beyond 0 or 1.
    return Interval(100 * max(0.0, low), 100 * min(1.0, high))


def exact_interval(right: int, total: int) -> Interval:
    """Return the exact interval of an accuracy by Clopper and Pearson, in percent.

    The ends are the accuracies at which so many right answers, or more, and so many, or fewer, have half of the
    probability that CONFIDENCE leaves.

    right: the number of right answers; total: the number of images, 1 or more.
    """
    rest = (1 - CONFIDENCE) / 2
    low = _root(lambda share: _at_least(right, total, share) - rest) if right else 0.0
    high = _root(lambda share: rest - _at_least(total - right, total, 1 - share)) if right < total else 1.0
    return Interval(100 * low, 100 * high)


def _root(rising: Callable[[float], float]) -> float:
    """Return where a function that rises from below 0 at 0 to above 0 at 1 is 0."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _at_least(hits: int, trials: int, share: float) -> float:
    """Return the probability of so many hits or more where each trial hits with the probability share.

    hits: 1 or more; share: above 0 and below 1.
    """
    log_share, log_rest = math.log(share), math.log1p(-share)
    whole = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(n + 1) - math.lgamma(trials - n + 1) + n * log_share + (trials - n) * log_rest)
        for n in range(hits, trials + 1)
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean, the standard deviation and the interval of the mean of a measure, or None without a value.

    values: the measure of each seed.
    """
    if not values:
        return None
    if len(values) == 1:
        return Spread(1, values[0])
    mean, std = fmean(values), stdev(values)
    reach = student_quantile(len(values) - 1) * std / math.sqrt(len(values))
    return Spread(len(values), mean, std, Interval(mean - reach, mean + reach))


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the t for which a variable of Student's distribution lies between -t and t with a probability.

    freedom: the degrees of freedom.
    confidence: the probability.
    """
    low, high = 0.0, 1.0
    while student_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if student_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def student_probability(t: float, freedom: int) -> float:
    """Return the probability that a variable of Student's distribution lies between -t and t.

    The sum is finite for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    t: at least 0.
    freedom: the degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(3 if odd else 2, freedom - 1, 2):
        term *= (power - 1) / power * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def paired_test(first_only: int, second_only: int) -> PairedTest:
    """Compare two predictors on the same images by McNemar's test.

    The test is the two-sided binomial one, which is exact, for up to MAX_EXACT images on which one of the two is right
    and the other wrong. Beyond, it is the chi-squared one with a correction for continuity.

    first_only, second_only: how many images only the first and only the second predictor gets right.
    """
    count = first_only + second_only
    if count <= MAX_EXACT:
        fewer = min(first_only, second_only)
        tail = sum(math.comb(count, number) for number in range(fewer + 1))
        return PairedTest(first_only, second_only, min(1.0, 2 * tail / 2**count), "exact binomial")
    squared = max(0, abs(first_only - second_only) - 1) ** 2 / count
    p = math.erfc(math.sqrt(squared / 2))
    return PairedTest(first_only, second_only, p, "chi-squared with a correction for continuity")


def calibration_bins(answers: Iterable[tuple[float, bool]]) -> list[CalibrationBin]:
    """Put answers into ECE_BINS bins of equal width by their confidence, and return the bins from 0 to 1.

    answers: the confidence of each answer, from 0 to 1, and whether the answer is right.
    """
    counts, confidences, right = [0] * ECE_BINS, [0.0] * ECE_BINS, [0] * ECE_BINS
    for confidence, correct in answers:
        # A bin contains its upper end and not its lower one.
        place = min(max(math.ceil(confidence * ECE_BINS) - 1, 0), ECE_BINS - 1)
        counts[place] += 1
        confidences[place] += confidence
        right[place] += correct
    return [
        CalibrationBin(
            place / ECE_BINS, (place + 1) / ECE_BINS, count, sure / count if count else None,
            hits / count if count else None,
        )
        for place, (count, sure, hits) in enumerate(zip(counts, confidences, right, strict=True))
    ]  # fmt: skip


def calibration_error(answers: Iterable[tuple[float, bool]]) -> float | None:
    """Return the expected calibration error in percent, or None without answers.

    The error is the mean over all answers of the distance between the accuracy of the answer's bin and the mean
    confidence there; see calibration_bins.

    answers: the confidence of each answer, from 0 to 1, and whether the answer is right.
    """
    bins = calibration_bins(answers)
    total = sum(one.answers for one in bins)
    if not total:
        return None
    apart = (one.answers * abs((one.accuracy or 0.0) - (one.confidence or 0.0)) for one in bins)
    return 100 * sum(apart) / total
