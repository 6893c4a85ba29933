"""What the demo prints can be read as it stands."""

from __future__ import annotations

from rada_fast.demo import shown_gain
from rada_fast.reports.measures import Gain, Interval


def test_a_gain_that_rounds_to_zero_has_no_minus_sign() -> None:
    assert shown_gain(Gain(1.875, Interval(-0.04, 3.79))) == "+1.9 (0.0 to 3.8)"
    assert shown_gain(Gain(-0.04, Interval(-2.1, 2.02))) == "+0.0 (-2.1 to 2.0)"
    assert shown_gain(None) == ""
