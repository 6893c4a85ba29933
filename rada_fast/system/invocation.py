"""The command line that started this process, for messages and files that say how to go on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rada_fast import _env

_started: list[list[str]] = []
"""What started the program, and the arguments of the command that is running, if it is run from a command line."""


def remember(arguments: Sequence[str], *, of_process: bool = False) -> None:
    """Keep the arguments of a command line. of_process: whether they are those with which this process was started."""
    _started[:] = [_program(list(arguments)) if of_process else ["rada-fast"], list(arguments)]


def command_line() -> str | None:
    """Return the command that starts the same work again, quoted for a shell, or None for a program in Python."""
    return shlex.join([word for words in _started for word in words]) if _started else None


def _program(arguments: list[str]) -> list[str]:
    """Return how this process was started, without the arguments of the command: also torchrun with its options."""
    if (variables := _env.rank_variables()) is not None:
        launcher = _words_of_process(os.getppid())
        if len(launcher) > len(arguments) and launcher[len(launcher) - len(arguments) :] == arguments:
            words = launcher[: len(launcher) - len(arguments)]
            return ["torchrun", *words[2:]] if len(words) > 1 and Path(words[1]).name == "torchrun" else words
        return ["torchrun", "--nproc-per-node", str(variables.local_size), "-m", "rada_fast"]
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.orig_argv[0], "-m", "rada_fast"]
    found = shutil.which(program.name)
    return [program.name if found is not None and Path(found).resolve() == program.resolve() else str(program)]


def _words_of_process(id: int) -> list[str]:
    """Return the command line of a process, or nothing where the system does not show it."""
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{id}/cmdline").read_bytes().split(b"\0")[:-1]]
    except OSError:
        return []
