"""The command line that started this process, for messages and files that say how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_arguments: list[list[str]] = []
"""The arguments of the command that is running, if it was started from the command line."""


def remember(arguments: Sequence[str]) -> None:
    """Keep the arguments that the command line was given."""
    _arguments[:] = [list(arguments)]


def command_line() -> str | None:
    """Return the command that starts the same work again, quoted for a shell, or None for a program in Python."""
    return shlex.join(["rada-fast", *_arguments[0]]) if _arguments else None
