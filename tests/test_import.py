"""What is found without being installed."""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import rada_fast


def test_a_checkout_finds_its_kernels_without_being_installed() -> None:
    # As an interpreter does that knows of no installed package.
    found = PathFinder.find_spec("rada_fast.kernels", rada_fast.__path__)
    assert found is not None
    assert found.origin is not None
    assert Path(found.origin).with_name("rational_projections.py").is_file()
