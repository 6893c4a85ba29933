"""The list of hostile files, what a payload does, and what cases have in common."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.pictures import write_picture

ROOT = Path(sys.argv[1] if sys.argv[0].endswith("hostile/__main__.py") else "hostile")
"""The folder of all files, which the process of __main__.py is given."""
MARK = ROOT / "executed"
"""The file that a payload makes if it is executed."""
VICTIM = ROOT / "victim"
"""A file outside of all output folders."""


class Evil:
    """Unpickling an Evil starts a program that makes MARK."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {MARK}",))


class Opener:
    """Unpickling an Opener makes MARK without a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(MARK), "w"))


class Case(NamedTuple):
    """A hostile file and the command that reads it.

    plant: writes the file into a new folder, and returns the arguments of the command.
    statuses: the exit statuses that are allowed. Others than 2 stand for commands that can go on without the file.
    """

    plant: Callable[[Path], list[str]]
    statuses: tuple[int, ...] = (2,)


CASES: dict[str, Case] = {}


def case(name: str, *statuses: int) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    def add(plant: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        CASES[name] = Case(plant, statuses or (2,))
        return plant

    return add


def pictures(folder: Path) -> Path:
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for index in range(2):
            write_picture(folder / "pictures" / name / f"{index}.png", color, size=32)
    return folder / "pictures"


def features(folder: Path, name: str = "good.npz") -> str:
    rows = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    np.savez(folder / name, features=rows, labels=np.arange(8) % 2)
    np.savez(folder / "text.npz", features=rows[:2], labels=np.arange(2))
    return f"features:{folder / name}"


def ttt(folder: Path, **options: Any) -> list[str]:
    """Return the arguments of ttt on good features, with other options."""
    values = {"data": features(folder), "text-features": f"features:{folder}/text.npz", "logit-scale": "50"}
    return ["ttt", *given(folder, values | {name.replace("_", "-"): value for name, value in options.items()})]


def on_pictures(folder: Path, **options: Any) -> list[str]:
    """Return the arguments of ttt on good pictures, with other options."""
    values = {"data": f"imagefolder:{pictures(folder)}", "views": "2"}
    return ["ttt", *given(folder, values | options)]


def given(folder: Path, values: dict[str, Any]) -> list[str]:
    pairs = (values | {"output": folder / "out"}).items()
    return [word for name, value in pairs for word in (f"--{name}", str(value))]


def lying_safetensors(path: Path, **entries: Any) -> None:
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def evil_zip(path: Path, payload: Any = None, name: str = "archive/data.pkl") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, pickle.dumps(payload or Evil(), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/code/__torch__.py", f"import os\nos.system('touch {MARK}')\n")
        archive.writestr("../../victim", "written by an archive")


@contextlib.contextmanager
def quiet() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err
