"""The lists of planted bugs fit the sources. Whether the tests catch the bugs is what `make mutants` finds out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mutants.entries import KINDS, ROOT, EntryError, Mutant, read

MUTANTS = read()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_can_be_planted(mutant: Mutant) -> None:
    assert mutant.planted(ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")


def test_an_entry_that_fits_no_longer_is_named() -> None:
    gone = replace(MUTANTS[0], text="no source has this text")
    with pytest.raises(EntryError, match=f"{gone.name}: the text is found 0 times in {gone.file}"):
        gone.planted(ROOT)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_exist(mutant: Mutant) -> None:
    for test in mutant.tests:
        path, _, rest = test.partition("::")
        name = rest.partition("[")[0]
        assert (ROOT / path).exists(), test
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else True, test


def test_the_lists_are_long_and_of_every_kind() -> None:
    assert len(MUTANTS) >= 40
    for place in ("kernels/", "csrc/cuda/", "csrc/cpu/"):
        assert sum(mutant.file.startswith(place) for mutant in MUTANTS) >= 10, place
    assert {mutant.kind for mutant in MUTANTS} == set(KINDS)
