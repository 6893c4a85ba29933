"""Checks of a configuration's fields: each raises UserError naming the field, what was expected and what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rada_fast.errors import UserError

MOST = 2**31 - 1
"""The largest count of anything."""
MOST_SEED = 2**63 - 1
"""The largest seed that every generator takes."""
MOST_REAL = 1e38
"""The largest learning rate, weight or temperature: float32 holds it."""
MOST_WORKERS = 1024
MOST_LAYERS = 1024


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float, *, zero_ok: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 0 if zero_ok else value > 0):
        raise UserError(f"{name} must be {'at least 0' if zero_ok else 'above 0'}, got {_shown(value)}")
    if value > MOST_REAL:
        raise UserError(f"{name} must be at most {MOST_REAL:g}, got {_shown(value)}")


def check_whole(name: str, value: int, least: int, most: int = MOST) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {_shown(value)}")
    if value > most:
        raise UserError(f"{name} must be a whole number of at most {most}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value as it was given; a whole number too long to be written out, by its length."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return repr(value)


def check_text(name: str, value: str | None) -> None:
    """A name or a path: some text, without the character that no path can hold."""
    if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
        raise UserError(f"{name} must be a text that is neither empty nor has a NUL character, got {value!r}")


def _without_tilde(name: str, path: str) -> str:
    """A path in which a leading ~ or ~user is written out; a KIND:PATH keeps its kind."""
    kind, colon, place = path.partition(":")
    if not path.startswith("~") and not (colon and place.startswith("~") and kind.isalpha()):
        return path
    before, home = ("", path) if path.startswith("~") else (kind + colon, place)
    try:
        return before + str(Path(home).expanduser())
    except RuntimeError:
        raise UserError(f"{name} begins with a home folder that is not known here, got {path!r}") from None


def check_paths(config: Any, *names: str) -> None:
    """Check fields that hold a path, several or none, and write their home folders out."""
    for name in names:
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        for path in paths:
            check_text(name, path)
        whole = tuple(path if path is None else _without_tilde(name, path) for path in paths)
        object.__setattr__(config, name, whole if isinstance(value, tuple) else whole[0])
