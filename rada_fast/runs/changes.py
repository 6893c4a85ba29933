"""The differences between what a folder holds and what a new run would store there, as texts for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def describe_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describe which entries were added, removed or replaced between two listings, or return an empty text."""
    changes = {
        "added": [id for id in new if id not in old],
        "removed": [id for id in old if id not in new],
        "replaced": [id for id, stamp in new.items() if id in old and old[id] != stamp],
    }
    return "; ".join(f"{what}: {first_of(ids)}" for what, ids in changes.items() if ids)


def first_of(names: Sequence[str], count: int = 3) -> str:
    """Return the first few names as one text, with the number of the others."""
    more = len(names) - count
    return ", ".join(ascii(name)[1:-1] for name in names[:count]) + (f" and {more} more" if more > 0 else "")


def describe_change_of_values(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describe the values that differ between two listings, or return an empty text."""
    return "; ".join(
        f"{name} {value} there, {new.get(name, 'none')} here" for name, value in old.items() if new.get(name) != value
    )


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield the entries in which two JSON values differ: options with both values, other entries by name alone."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in set(old) | set(new):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        if name == "code" or name.startswith("arithmetic."):
            what = name.removeprefix("arithmetic.").replace("_", " ")
            yield f"{what} {old or 'as usual'} there, {new or 'as usual'} here"
            return
        if not name.startswith("options."):
            yield name.replace("_", " ")
            return
        option = "--" + name.rpartition(".")[2].replace("_", "-")
        before, now = ("not given" if value is None else json.dumps(value) for value in (old, new))
        yield f"{option} {before} there, {now} here"
