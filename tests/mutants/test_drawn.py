"""Drawn bugs are small changes of code that fit the sources, and a seed draws the same ones again."""

from __future__ import annotations

import ast

import pytest

from tests.mutants.drawn import changes_of_cpp, changes_of_python, draw
from tests.mutants.entries import ROOT


def applied(source: str, changes: object) -> set[str]:
    return {source[:begin] + becomes + source[end:] for begin, end, becomes in changes}  # type: ignore[attr-defined]


def test_python_is_changed_in_functions_alone() -> None:
    source = '''"""Add 1 + 1."""
from a import b
LIMIT = 1 + 1
def f(x, y=3):
    """Return x < 1."""
    # x < 1
    if x < LIMIT and y:
        tl.store(x, y, mask=x)
    return x
'''
    found = {
        new.splitlines()[-3].strip() + new.splitlines()[-2].strip()
        for new in applied(source, changes_of_python(source))
    }
    unchanged = "tl.store(x, y, mask=x)"
    assert found == {f"if {test}:{unchanged}" for test in ("x <= LIMIT and y", "x < LIMIT", "y", "True", "False")} | {
        f"if x < LIMIT and y:{call}" for call in ("pass", "tl.store(x, y)", "tl.store(y, x, mask=x)")
    }


def test_cpp_is_not_changed_in_comments_and_directives() -> None:
    source = """#if A < 2
// a < b
for (int i = 0; i < n; ++i) {
  total += x[i];
}
"""
    before = "for (int i = 0; i < n; ++i) {"
    loops = {new.splitlines()[2] for new in applied(source, changes_of_cpp(source))} - {before}
    assert loops == {"for (int i = 1; i < n; ++i) {", "for (int i = 0; i <= n; ++i) {"}
    bodies = {new.splitlines()[3] for new in applied(source, changes_of_cpp(source))} - {"  total += x[i];"}
    assert bodies == {"  total = x[i];", "  total += x[i + 1];", ""}


@pytest.mark.parametrize("place", ["kernels/", "rada_fast/ops/", "csrc/cpu/", "csrc/cuda/"])
def test_drawn_bugs_can_be_planted(place: str) -> None:
    drawn = draw([place], 40, 0)
    assert [mutant.name for mutant in drawn] == [mutant.name for mutant in draw([place], 40, 0)]
    assert len({mutant.name for mutant in drawn}) == 40
    for mutant in drawn:
        planted = mutant.planted(ROOT)
        assert planted != (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.file.startswith(place)
        assert all((ROOT / test).exists() for test in mutant.tests)
        if mutant.file.endswith(".py"):
            ast.parse(planted)
