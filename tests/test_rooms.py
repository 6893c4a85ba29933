"""The table of rooms in CONTRIBUTING.md agrees with the sources, which these tests read without importing them."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = ("rada_fast", "kernels", "csrc", "benchmarks", "tests", "docs", "examples", ".ci")
LEFT_OUT = {"__pycache__", "lib", "kernels.egg-info"}
ENVIRONMENT = re.compile(
    r"os\.(environ|getenv|putenv)\b"
    r"|torch\.cuda\.(is_available|device_count|get_device_\w+)\b"
    r"|torch\.(version\.(cuda|hip)|backends\.cpu\.\w+)\b"
)
"""Only _env.py may contain these expressions, which read the environment or query devices."""

SYSTEM_HEADERS = {"sys", "immintrin"}


@dataclass(frozen=True)
class Room:
    """A Room is a row of the table.

    patterns: the files, as paths below the checkout with wildcards; a pattern that ends in / is a whole folder.
    imports: the packages and the rooms of other rows that its files may import, besides the standard library.
    """

    name: str
    patterns: tuple[str, ...]
    imports: frozenset[str]

    def fit(self, path: str) -> int:
        """Return the length of the longest pattern that a file matches, or 0."""
        fitting = (p for p in self.patterns if (path.startswith(p) if p.endswith("/") else fnmatch(path, p)))
        return max(map(len, fitting), default=0)


def rooms() -> list[Room]:
    """Read the rows of CONTRIBUTING.md's table, from the command line down to the lowest room."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    found = []
    for row in table:
        first, _, third = (cell.strip() for cell in row.strip("|").split(" | "))
        patterns = tuple(re.findall(r"`([^`]+)`", first))
        found.append(Room(short(patterns[0]), patterns, frozenset(re.findall(r"`([^`]+)`", third))))
    return found


def short(pattern: str) -> str:
    """Return a room's name in the column of imports: ops for rada_fast/ops/, _env for rada_fast/_env.py."""
    return pattern.removeprefix("rada_fast/").removesuffix("/").removesuffix(".py")


ROOMS = rooms()


def room_of(path: str) -> Room | None:
    """Return the row that lists a file; where several do, the one with the longest pattern."""
    best = max(ROOMS, key=lambda room: room.fit(path))
    return best if best.fit(path) else None


def files(*suffixes: str) -> list[str]:
    """List the sources of the checkout, as paths below it."""
    found = (path for top in TOP for path in sorted((ROOT / top).rglob("*")) if path.is_file())
    paths = [path.relative_to(ROOT) for path in found]
    return [
        path.as_posix()
        for path in paths
        if not LEFT_OUT & set(path.parts) and (not suffixes or path.suffix in suffixes)
    ]


def file_of(module: str) -> str | None:
    """Return the file of a module of ours, or None for a module of another package or a name inside a module."""
    head, *parts = module.split(".")
    if head == "rada_fast" and parts[:1] == ["kernels"]:
        head, parts = "kernels", parts[1:]
    if head not in ("rada_fast", "kernels", "benchmarks", "tests"):
        return None
    module_path = ROOT.joinpath(head, *parts)
    for file in (module_path / "__init__.py", module_path.with_suffix(".py")):
        if file.is_file():
            return file.relative_to(ROOT).as_posix()
    return None


def imported(source: str) -> set[str]:
    """Return what a source imports, also inside functions: our own modules as paths, other packages by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import would hide the room that it names from this test and from a reader.
            assert node.module is not None, f"line {node.lineno} imports relatively; use the full name"
            assert node.level == 0, f"line {node.lineno} imports from .{node.module}; use the full name"
            # A name may be a module of the package or something defined in it.
            names = [whole if file_of(whole := f"{node.module}.{alias.name}") else node.module for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"rada_fast[\w.]*:\w+", str(node.value)):
            names = [node.value.split(":")[0]]  # a function that is imported when it is called
        for name in names:
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names:
                found.add(file_of(name) or package)
    return found


def test_every_file_has_a_row() -> None:
    assert [path for path in files() if room_of(path) is None] == []


def test_every_row_has_a_file() -> None:
    for room in ROOMS:
        for pattern in room.patterns:
            assert any(Room("", (pattern,), frozenset()).fit(path) for path in files()), pattern


def test_a_row_lists_only_rooms_below_it() -> None:
    order = [room.name for room in ROOMS]
    for row, room in enumerate(ROOMS):
        above = room.imports & set(order[:row])
        assert not above, f"the row of {room.name} lists {above}, whose rows are above it"


@pytest.mark.parametrize("room", [room for room in ROOMS if "tests/" not in room.patterns], ids=lambda room: room.name)
def test_a_room_imports_what_its_row_lists(room: Room) -> None:
    used: set[str] = set()
    for path in files(".py"):
        if room_of(path) is not room:
            continue
        for name in imported((ROOT / path).read_text()):
            home = room_of(name) if "/" in name else None
            if home is room:
                continue
            need = home.name if home else name
            assert need in room.imports, f"{path} imports {name}, but the row of {room.name} does not list {need}"
            used.add(need)
    if any(room_of(path) is room for path in files(".py")):
        assert used == room.imports, (
            f"the row of {room.name} lists {room.imports - used}, which none of its files imports"
        )


def questions(source: str) -> list[str]:
    """Return what a source asks of the environment or the devices, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked = []
        if isinstance(node, ast.Attribute):
            asked = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom):
            asked = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [f"{node.lineno}: {match[0]}" for name in asked if (match := ENVIRONMENT.match(name))]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']", "from os import environ", "import os\nos.getenv('A')",
        "from os import getenv as g",
        "torch.cuda.is_available()", "from torch.cuda import device_count", "torch.cuda.get_device_properties(0)",
    ],
)  # fmt: skip
def test_questions_are_found_however_they_are_asked(source: str) -> None:
    assert len(questions(source)) == 1


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "def f():\n  import torch\n  from rada_fast.config import method\nPLACE = 'rada_fast.demo:run_demo'\nimport os"
    )
    assert imported(source) == {"torch", "rada_fast/config/method.py", "rada_fast/demo.py"}
    for relative in ("from . import method", "from .method import AdapterConfig"):
        with pytest.raises(AssertionError, match="use the full name"):
            imported(relative)


def test_only_env_reads_the_environment_and_queries_devices() -> None:
    for path in files(".py"):
        if not path.startswith(("rada_fast/", "kernels/")) or path == "rada_fast/_env.py":
            continue
        assert questions((ROOT / path).read_text()) == [], f"{path} asks what only rada_fast/_env.py may ask"


def test_c_sources_include_what_their_row_lists() -> None:
    for path in files(".cpp", ".h", ".cu", ".cuh"):
        room = room_of(path)
        assert room is not None
        for line in (ROOT / path).read_text().splitlines():
            if not (found := re.match(r'#include ([<"])([^>"]+)', line)):
                continue
            if found[1] == '"':
                target = ((ROOT / path).parent / found[2]).resolve()
                home = room_of(target.relative_to(ROOT).as_posix())
                need = home.name if home else found[2]
                assert home is room or need in room.imports, f"{path} includes {found[2]}, which its row does not list"
            elif (library := found[2].split("/")[0].removesuffix(".h")) != found[2] and library not in SYSTEM_HEADERS:
                assert library in room.imports, f"{path} includes <{found[2]}>, which its row does not list"


def test_no_source_file_is_longer_than_500_lines() -> None:
    lines = {path: (ROOT / path).read_text().count("\n") for path in files(".py", ".cpp", ".h", ".cu", ".cuh")}
    assert {path: count for path, count in lines.items() if count > 500} == {}
