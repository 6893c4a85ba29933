"""A checkout can be imported without being installed, and public names without more imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import rada_fast


def test_a_checkout_finds_its_kernels_without_being_installed() -> None:
    # PathFinder does not know of packages that are installed in editable mode.
    spec = PathFinder.find_spec("rada_fast.kernels", rada_fast.__path__)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("rational_projections.py").is_file()


def test_every_public_name_is_there_after_import_rada_fast_alone() -> None:
    code = "import rada_fast; print([name for name in rada_fast.__all__ if not hasattr(rada_fast, name)])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
