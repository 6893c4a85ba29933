"""Amounts of memory are read with their units."""

from __future__ import annotations

from typing import Any

import pytest

from rada_fast.config.checks import bytes_of
from rada_fast.errors import UserError


@pytest.mark.parametrize(
    ("value", "amount"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("64kB", 64_000), ("7B", 7), ("1TiB", 2**40)],
)
def test_amounts_of_memory_have_units(value: str, amount: int) -> None:
    assert bytes_of("memory", value) == amount


@pytest.mark.parametrize("value", ["2", "2gib", "GiB", "-1GiB", "0GiB", "0.1B", "1e3MB", "2GiB\n", "", 2, None])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match="memory must be an amount of memory such as 2GiB"):
        bytes_of("memory", value)
