"""Start several processes with the variables of torchrun, for tests of what they do together.

They are forked from one process that has imported PyTorch once, so that a group of them starts in a fraction of a
second. torchrun itself takes about ten times as long.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "open_clip", "rada_fast.cli", "rada_fast.loops.ttt"])


def free_port() -> int:
    """Return a port that nothing listens to at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for one of several processes on one machine."""
    ranks = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@dataclass(frozen=True)
class Rank:
    """A process of a group and the files of what it prints."""

    process: BaseProcess
    output: Path
    errors: Path

    def wait(self, seconds: float = 120.0) -> int:
        """Wait for the end of the process, and return its exit status; -9 says that it was killed."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"a rank did not end: {self.errors.read_text()}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def start_ranks(
    count: int, folder: Path, function: Callable[..., Any], *arguments: Any, seen: int | None = None
) -> list[Rank]:
    """Start a function of a module in several processes, and return them at once.

    count: how many processes; folder: what they print is written to files here.
    function: it is called in each process with the arguments. What it returns is the exit status; None stands for 0.
    seen: how many processes are really started, the first ones, if the others shall be missing.
    """
    port, variables = free_port(), dict(os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for rank in range(count if seen is None else seen):
        output, errors = (folder / f"{rank}.{kind}" for kind in ("out", "err"))
        own = variables | torchrun_variables(rank, count, port)
        process = _CONTEXT.Process(target=_run, args=(own, output, errors, function, arguments))
        process.start()
        found.append(Rank(process, output, errors))
    return found


def run_ranks(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Rank]:
    """Start a function in several processes as start_ranks does, wait for them, and check that none has failed."""
    found = start_ranks(count, folder, function, *arguments)
    statuses = [rank.wait() for rank in found]
    assert not any(statuses), [(status, rank.errors.read_text()) for status, rank in zip(statuses, found, strict=True)]
    return found


def command(arguments: Sequence[str]) -> int:
    """Run a command of the command line, as `python -m rada_fast` does."""
    from rada_fast.cli import main

    return main(list(arguments))


def say(text: str) -> None:
    """Print a line from any rank, also from one whose prints go nowhere."""
    os.write(1, f"{text}\n".encode())


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come to hold"
        time.sleep(0.01)


def _run(
    variables: dict[str, str], output: Path, errors: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    status = 70
    try:
        status = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
