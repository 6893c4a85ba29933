"""The planted bugs: reading the lists beside this file, and putting one of the bugs into a checkout."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

LISTS = Path(__file__).parent
ROOT = LISTS.parents[1]
KINDS = {
    "arithmetic": "a wrong factor, sign, constant or function",
    "accumulator": "a sum that starts from the wrong value, or that leaves out a part",
    "boundary": "off by one at the edge of a tile, a picture or a vector",
    "gradient": "a term of a gradient that is missing or belongs elsewhere",
    "indexing": "a wrong stride or offset",
    "launch": "a kernel is launched with code made for other arguments, on another stream, or past a simulator",
    "limit": "wrong only beyond what one launch, block or register holds",
    "precision": "rounded where it must not be, or kept in a narrower type",
    "race": "memory is read before another thread has stored there, or overwritten before it has read",
    "randomness": "numbers that are drawn in another order, or from another range",
    "special value": "wrong for an exact zero, an infinity or a NaN",
    "tie": "another one of equal values is chosen",
}
"""What an entry may name as its kind, and what that means."""


class EntryError(Exception):
    """An entry that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Mutant:
    """A bug to plant.

    name: what it is called in the results, unique among all lists.
    file: the source, as a path below the checkout.
    kind: one of KINDS.
    text: what stands in the source, exactly once.
    becomes: what replaces it.
    tests: the tests that should fail, as arguments of pytest.
    equivalent: why no test can see the bug, or "" where one must.
    """

    name: str
    file: str
    kind: str
    text: str
    becomes: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def planted(self, root: Path) -> str:
        """The source with the bug in it. Raises EntryError where the text is not there exactly once."""
        try:
            source = (root / self.file).read_text(encoding="utf-8")
        except OSError as error:
            raise EntryError(f"{self.name}: {self.file} cannot be read ({error.strerror})") from None
        found = source.count(self.text)
        if found != 1:
            raise EntryError(f"{self.name}: the text is found {found} times in {self.file}, and must be found once")
        return source.replace(self.text, self.becomes)

    def key(self, root: Path) -> str:
        """A hash of the entry, of its source and of its tests: a result holds as long as none of them changes."""
        whole = json.dumps(asdict(self)) + content_hash([root / self.file])
        return hashlib.sha256((whole + "".join(tests_key(test, "") for test in self.tests)).encode()).hexdigest()[:16]


def content_hash(paths: list[Path]) -> str:
    """A hash of the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tests_key(test: str, code: str) -> str:
    """A hash of an argument of pytest, of the tests that it names, and of what stands for the code that they test.

    The helpers that tests share count as theirs.
    """
    place = ROOT / test.partition("::")[0]
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    files += [place.parent / "conftest.py", ROOT / "tests" / "support.py", ROOT / "tests" / "conftest.py"]
    files = [path for path in files if path.is_file()]
    return hashlib.sha256(f"{test} {code} {content_hash(files)}".encode()).hexdigest()[:16]


def read() -> list[Mutant]:
    """All entries of all lists, in their order. Raises EntryError for one that is not whole."""
    mutants: list[Mutant] = []
    names: set[str] = set()
    for path in sorted(LISTS.glob("*.toml")):
        for number, entry in enumerate(tomllib.loads(path.read_text(encoding="utf-8"))["mutant"], 1):
            try:
                mutant = Mutant(**entry | {"tests": tuple(entry["tests"])})
            except (KeyError, TypeError) as error:
                raise EntryError(f"{path.name}, entry {number}, is not whole: {error}") from None
            if mutant.name in names:
                raise EntryError(f"{path.name}: two entries are named {mutant.name}")
            if mutant.kind not in KINDS:
                raise EntryError(f"{mutant.name}: kind must be one of {', '.join(KINDS)}, got {mutant.kind}")
            if mutant.text == mutant.becomes or not mutant.text or not mutant.tests:
                raise EntryError(f"{mutant.name} must replace a text by another one and name its tests")
            names.add(mutant.name)
            mutants.append(mutant)
    return mutants
