"""The progress of a run in a small file of its folder, which is replaced every few seconds while the run goes on.

It tells whoever watches the folder what the lines of results cannot say: how many there will be, how fast they come,
which process writes them, and the command that goes on after an interruption. No result depends on it.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rada_fast.system import invocation, notices

HEARTBEAT_FILE = "progress.json"
FORMAT = "rada_fast.progress.v1"
INTERVAL = 5.0
"""The shortest time between two writings of the file, in seconds."""
MOST_BYTES = 2**20
"""A larger file is not read."""
KEPT_WARNINGS = 5
"""The number of the last warnings that the file holds."""


class Heartbeat:
    """The file of one process in the folder of its run.

    folder: the folder of the run.
    name: the name of the file; a run of several processes has one for each.
    """

    def __init__(self, folder: Path, name: str = HEARTBEAT_FILE) -> None:
        self._path = folder / name
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            "process": os.getpid(),
            "host": platform.node(),
            "started": time.time(),
            "command": invocation.command_line(),
            "directory": str(Path.cwd()),
        }
        self._last = -INTERVAL

    def beat(self, state: Callable[[], Mapping[str, Any]], *, at_once: bool = False) -> None:
        """Write the state of the run, if the last writing is long enough ago or must not be waited for."""
        now = time.monotonic()
        if not at_once and now - self._last < INTERVAL:
            return
        self._last = now
        content = {
            **self._facts, "updated": time.time(), **state(), "warnings": notices.so_far()[-KEPT_WARNINGS:]
        }  # fmt: skip
        # A folder that cannot be written any more ends the run when it records its next result.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            # Nobody needs this file after a crash of the system, so nothing waits for the disk.
            temporary.write_text(json.dumps(content) + "\n", encoding="ascii")
            temporary.replace(self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file, because the summary of the run says everything."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


_running: list[Heartbeat] = []
"""The heartbeats of the runs of this process whose folders are open, the last one last."""


def begin(folder: Path, name: str = HEARTBEAT_FILE) -> Heartbeat:
    """Let progress be written into the folder of a run, until end() is called with the result."""
    running = Heartbeat(folder, name)
    _running.append(running)
    return running


def end(running: Heartbeat) -> None:
    """Write no more progress of a run."""
    if running in _running:
        _running.remove(running)


def beat(state: Callable[[], Mapping[str, Any]], *, at_once: bool = False) -> None:
    """Write the state of the present run into its folder, now and then. It does nothing where no run is open.

    state: a function that returns what there is to write.
    at_once: whether to write it even if the last writing is not long ago.
    """
    if _running:
        _running[-1].beat(state, at_once=at_once)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return what the heartbeats in the folder of a run say, one for each process. A damaged file is left out."""
    found = []
    stem, _, ending = HEARTBEAT_FILE.partition(".")
    for path in sorted(folder.glob(f"{stem}*.{ending}")):
        try:
            if path.is_file() and path.stat().st_size < MOST_BYTES:
                content = json.loads(path.read_bytes())
                if isinstance(content, dict) and content.get("format") == FORMAT:
                    found.append(content)
        except (OSError, ValueError, RecursionError):
            continue
    return found
