"""Read the JSON files that describe a model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rada_fast.errors import UserError

MAX_JSON_BYTES = 2**24
"""A larger description of a model is refused."""


def read_json(name: str, path: Path) -> dict[str, Any]:
    """Read a description of a model. Raises UserError naming the model if it is missing or damaged.

    name: the model, for messages; path: the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        found = json.loads(content)
    except FileNotFoundError:
        raise UserError(f"model {name}: the folder has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model {name}: {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"model {name}: {path} must hold an object, got {type(found).__name__}")
    return found
