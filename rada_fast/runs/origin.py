"""The run that an adapter comes from, and what runs have in common that differ in their seed and their data alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rada_fast.runs.contents import FORMAT, IDENTITY_FILE

DATA_OPTIONS = ("data", "train", "test", "new_test", "evaluate_on")
"""The options that name data, as --data does."""
MAX_IDENTITY_BYTES = 2**29
"""The largest run.json that is read. It has an entry for every picture."""
_OF_DATA = ("class_names", "templates", "text_features", "adapter_file")
"""The entries of an identity that follow from the data, and that of the adapter, which its origin replaces."""

_OF_CODE = ("code", "arithmetic")
"""The entries that say what has computed a run. A method stays the same whatever computes it."""


def origin_of(adapter: str | None) -> dict[str, Any] | None:
    """Return the facts about the run that trained an adapter, or None if the adapter comes from no run.

    adapter: the value of the option --adapter: a run's folder or a file in it.

    The facts are the folder, the command, the seed and the training data of the run, the name of its model, and the
    method of method_of.
    """
    if adapter is None:
        return None
    path = Path(adapter).expanduser()
    folder = path if path.is_dir() else path.parent
    identity = read_identity(folder)
    if identity is None:
        return None
    options = identity["options"]
    return {
        "folder": str(folder),
        "command": identity["command"],
        "seed": options.get("run", {}).get("seed"),
        "data": options.get("train") or options.get("data"),
        "model": {name: options.get("model", {}).get(name) for name in ("model", "pretrained")},
        "fingerprint": identity.get("model"),
        "method": method_of(identity, None),
    }


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity in the run.json of a folder, or None if there is no such file or no run wrote it."""
    path = folder / IDENTITY_FILE
    try:
        if not path.is_file() or path.stat().st_size > MAX_IDENTITY_BYTES:
            return None
        stored = json.loads(path.read_bytes())
        identity = stored["identity"]
        sound = stored["format"] == FORMAT and isinstance(identity["command"], str)
        return dict(identity) if sound and isinstance(identity["options"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def method_of(identity: Mapping[str, Any], origin: Mapping[str, Any] | None) -> str:
    """Return a hash of everything that decides a run except its seed and its data.

    Two runs with the same hash are repetitions of one experiment, or the same experiment on other data.

    identity: the identity of the run.
    origin: the origin of its adapter.
    """
    content = {
        "identity": {name: value for name, value in identity.items() if name not in (*_OF_DATA, *_OF_CODE, "options")},
        "options": method_options(identity),
        "adapter": origin["method"] if origin is not None else identity.get("adapter_file"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def method_options(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run that say nothing of its seed, its data or the file of its adapter, by their names."""
    found: dict[str, Any] = {}
    for name, value in identity["options"].items():
        found |= value if isinstance(value, dict) else {name: value}
    left_out = (*DATA_OPTIONS, "seed", "adapter", "classes", "text_features")
    return {name: value for name, value in found.items() if name not in left_out}
