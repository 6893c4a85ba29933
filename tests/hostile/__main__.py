"""Run a command on each hostile file in this process, and print as JSON what the command did.

`python -m tests.hostile FOLDER` is started by test_hostile_files.py. Python's audit events tell what a command does
beside its work: every program that it starts, every connection, every module that it imports from a planted folder, and
every change to a file outside of its output and cache folders. An audit hook cannot be removed again, which is why this
is a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import warnings
from typing import Any

import tests.hostile.data
import tests.hostile.models
import tests.hostile.runs  # noqa: F401 (these modules add their cases to CASES)
from rada_fast import cli
from tests.hostile.planting import CASES, MARK, ROOT, VICTIM, Evil, Opener, quiet
from tests.tiny_models import known_to_open_clip

COMMANDS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
}
NETWORK = {
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "urllib.Request",
    "http.client.connect",
}
CHANGES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.unpack_archive",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Collect what a command does that it must not do.

    armed: whether a command is running.
    allowed: the folders in which it may change files.
    """

    def __init__(self) -> None:
        self.armed = False
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in COMMANDS or event in NETWORK:
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & WRITES:
                self._check(event, path)
        elif event in CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._check(event, path)
        elif event == "import" and len(arguments) > 1 and arguments[1] and str(ROOT) in str(arguments[1]):
            self.seen.append(f"import {arguments!r}"[:200])

    def _check(self, event: str, path: Any) -> None:
        # A link in an allowed folder may lead out of it.
        real = os.path.realpath(os.fsdecode(path)) if event == "open" else os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        if not real.startswith(self.allowed):
            self.seen.append(f"{event} {real}")


def run_all() -> dict[str, dict[str, Any]]:
    """Run every case. Returns, for each, the exit status, the lines on standard error, and what was seen."""
    watch = Watch()
    cache = os.environ["RADA_FAST_CACHE"]
    results = {}
    with known_to_open_clip(ROOT / "configs"):
        for number, (name, one) in enumerate(CASES.items()):
            folder = ROOT / str(number)
            folder.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arguments = one.plant(folder)
            VICTIM.write_text("untouched")
            MARK.unlink(missing_ok=True)
            watch.seen, watch.allowed = [], (f"{folder}/out", f"{folder}/report", cache, "/dev/null")
            start = time.monotonic()
            with quiet() as (_, err):
                watch.armed = True
                status = cli.main(arguments)
                watch.armed = False
            results[name] = {
                "status": status, "lines": err.getvalue().splitlines(), "seen": watch.seen,
                "executed": MARK.exists(), "victim": VICTIM.read_text(), "seconds": time.monotonic() - start,
            }  # fmt: skip
    # The payloads themselves must be seen, or the results above say nothing.
    watch.seen, watch.armed = [], True
    for payload in (Evil(), Opener()):
        pickle.loads(pickle.dumps(payload))
    watch.armed = False
    results["control"] = {"seen": watch.seen, "executed": MARK.exists()}
    return results


if __name__ == "__main__":
    (ROOT / "configs").mkdir()
    print(json.dumps(run_all()))
