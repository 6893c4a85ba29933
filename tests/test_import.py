"""A checkout can be imported without being installed."""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

import rada_fast


def test_a_checkout_finds_its_kernels_without_being_installed() -> None:
    # PathFinder does not know of packages that are installed in editable mode.
    spec = PathFinder.find_spec("rada_fast.kernels", rada_fast.__path__)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("rational_projections.py").is_file()
