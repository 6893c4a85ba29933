"""Check the fields of configurations. Every check raises UserError with the field, what it must be and what it is."""

from __future__ import annotations

import re
import types
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rada_fast.errors import UserError

MAX_COUNT = 2**31 - 1
"""No count of anything may be larger."""
MAX_SEED = 2**63 - 1
"""Every random generator takes seeds up to this one."""
MAX_FLOAT = 1e37
"""No learning rate, weight or temperature may be larger. Adam's first step is ten times as long; float32 can still
represent it."""
MAX_WORKERS = 1024
MAX_LAYERS = 1024


def check_choices(config: Any) -> None:
    """Check every field of a configuration that is declared as a Literal, as one or None, or as a tuple of them."""
    for name, choices in _choices(config.__class__).items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            # 80.0 equals 80 and is no choice, and a list cannot be looked up in a set.
            if not any(type(one) is type(choice) and one == choice for choice in choices):
                allowed = ", ".join(repr(choice) for choice in choices if choice is not None)
                raise UserError(f"{name} must be one of {allowed}, got {one!r}")


@cache
def _choices(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values that each of the Literal fields may have."""
    return {name: found for name, hint in get_type_hints(kind).items() if (found := _choices_of(hint))}


def _choices_of(hint: Any) -> tuple[Any, ...]:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return arguments
    if get_origin(hint) is tuple:
        return _choices_of(arguments[0])
    if get_origin(hint) in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is types.NoneType:
        return (*found, None) if (found := _choices_of(arguments[0])) else ()
    return ()


def check_positive(name: str, value: float, *, zero_ok: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 0 if zero_ok else value > 0):
        raise UserError(f"{name} must be {'at least 0' if zero_ok else 'above 0'}, got {_described(value)}")
    if value > MAX_FLOAT:
        raise UserError(f"{name} must be at most {MAX_FLOAT:g}, got {_described(value)}")


def check_share(name: str, value: float) -> None:
    """Raise UserError unless a value is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{name} must be from 0 to 1, got {_described(value)}")


def check_integer(name: str, value: int, minimum: int, maximum: int = MAX_COUNT) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}, got {_described(value)}")
    if value > maximum:
        raise UserError(f"{name} must be a whole number of at most {maximum}, got {_described(value)}")


def _described(value: object) -> str:
    """Return the repr of a value, or words for a whole number that is too long to be written out."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    return repr(value)


_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_AMOUNT = re.compile(rf"(?P<number>\d{{1,15}}(?:\.\d{{1,15}})?) ?(?P<unit>{'|'.join(_UNITS)})")


def bytes_of(name: str, value: str) -> int:
    """Return the bytes of an amount of memory such as 2GiB or 1.5 GB. Raises UserError naming the field otherwise."""
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    amount = int(float(found["number"]) * _UNITS[found["unit"]]) if found else 0
    if amount < 1:
        raise UserError(f"{name} must be an amount of memory such as 2GiB or 512MiB, got {value!r}")
    return amount


class Interval(NamedTuple):
    """An interval in seconds or in steps; the other one is None."""

    seconds: float | None
    steps: int | None


_SECONDS = {"s": 1, "min": 60, "h": 3600}
_INTERVAL = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,15})?) ?(?P<unit>s|min|h|steps?)")


def interval_of(name: str, value: str) -> Interval:
    """Return an interval such as 10min or 500steps. Raises UserError naming the field otherwise."""
    found = _INTERVAL.fullmatch(value) if isinstance(value, str) else None
    number = float(found["number"]) if found else 0.0
    if found and number > 0 and found["unit"] in _SECONDS:
        return Interval(number * _SECONDS[found["unit"]], None)
    if number >= 1 and number.is_integer():
        return Interval(None, int(number))
    kinds = "a time such as 10min, 90s or 1h, or a number of steps such as 500steps"
    raise UserError(f"{name} must be {kinds}, got {value!r}")


def check_text(name: str, value: str | None) -> None:
    """Raise UserError where a name or a path is not a text, is empty, or holds the one character that no path can."""
    if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
        raise UserError(f"{name} must be a text that is neither empty nor has a NUL character, got {value!r}")


def expand_home(name: str, path: str) -> str:
    """Replace a leading ~ or ~user in a path, or in the path of a KIND:PATH, by the home folder."""
    kind, colon, rest = path.partition(":")
    if not path.startswith("~") and not (colon and rest.startswith("~") and re.fullmatch(r"[a-z][a-z0-9-]*", kind)):
        return path
    prefix, unexpanded = ("", path) if path.startswith("~") else (kind + colon, rest)
    try:
        return prefix + str(Path(unexpanded).expanduser())
    except RuntimeError:
        raise UserError(f"{name} begins with a home folder that is not known here, got {path!r}") from None


def check_paths(config: Any, *names: str) -> None:
    """Check fields that hold a path, several paths or None, and replace a leading ~ in each path."""
    for name in names:
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        for path in paths:
            check_text(name, path)
        expanded = tuple(path if path is None else expand_home(name, path) for path in paths)
        object.__setattr__(config, name, expanded if isinstance(value, tuple) else expanded[0])
