"""Kill runs at random moments, start each again, and compare its results with those of an uninterrupted run.

Run it with `make kills`, or `make kills COUNT=20 SEED=1`. The runs are those of ttt, eft (with crops and an evaluation
after every epoch) and fft (both stages), with the shipped model and a few pictures, and save their state every step or
two. A run is a process forked from this one, which has imported whatever a run imports and has computed nothing.
It executes the command line from its arguments to its exit status, and SIGKILL ends it:

- "moment" (2 of 5): after a random time, drawn evenly from the time of an uninterrupted run.
- "call" (3 of 10): right before a random one of its calls that open a file for writing, rename, remove or truncate one,
  in the output folder or in the cache. These are also the moments between a temporary file and its renaming.
- "line" (3 of 20): when half of a random line is written.
- "state" (3 of 20): in the middle of a random one of the writes of a state of the training.

The run then goes on, in a new process, to its end. It must have the files, the weights and the numbers of the
uninterrupted run, and still have every line that was complete when it was killed. Each kill is a line of JSON on
standard output; the last one counts them. The exit status is 1 if any run differs.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rada_fast import cli
from rada_fast.system import files
from tests.loops.support import results

KINDS = {"moment": 8, "call": 6, "line": 3, "state": 3}
"""The kinds of kills, and how often each is drawn."""
CALLS = {"open", "os.rename", "os.remove", "os.truncate", "os.rmdir", "shutil.rmtree"}
"""The audit events of the interpreter that stand for changes of files."""
PATIENCE = 300.0
"""The most seconds that a run may take."""


@dataclass(frozen=True)
class Trial:
    """A kill: the command, the kind of moment, and which one: a share of the time, or the number of an event."""

    command: str
    kind: str
    at: float


def arguments(command: str, data: Path, output: Path) -> list[str]:
    """Return the command line of a small run."""
    shared = ["--output", str(output), "--workers", "0"]
    images = f"imagefolder:{data}"
    if command == "ttt":
        return ["ttt", "--data", images, "--views", "4", "--episodes", "2", *shared]
    training = ["--train", images, "--test", images, "--train-views", "crop"]
    if command == "eft":
        extra = ["--epochs", "3", "--batch-size", "2", "--evaluate-every", "1", "--save-every", "2steps"]
        return ["eft", *training, *extra, *shared]
    extra = ["--epochs", "2", "--finetune-from", "1", "--finetune-epochs", "2", "--batch-size", "3"]
    return ["fft", *training, *extra, "--finetune-lr", "1e-4", "--save-every", "1step", *shared]


def write_pictures(root: Path) -> Path:
    """Write two pictures of noise for each of four classes, and one that cannot be read."""
    generator = np.random.default_rng(0)
    for name in ("red plain square", "blue plain ring", "green plain ring", "red plain ring"):
        (root / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    (root / "blue plain ring" / "torn.png").write_bytes((root / "blue plain ring" / "0.png").read_bytes()[:99])
    return root


def start(command: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Start a command line in a forked process. Returns its id.

    folder: the folder of its cache and of what it prints.
    prepare: this is called in the new process first.
    """
    sys.stdout.flush()
    if id := os.fork():
        return id
    status = 99
    try:
        os.environ["RADA_FAST_CACHE"] = str(folder / "cache")
        printed = os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        prepare()
        status = cli.main(command)
    finally:
        os._exit(status)


def wait(id: int, seconds: float = PATIENCE) -> int | None:
    """Wait for a process. Returns its exit status (minus a signal that ended it), or None if it goes on."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(id, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch_calls(below: Path, event: Callable[[], object]) -> None:
    """Call a function before every call of this process that changes a file below a folder."""
    root = str(below)

    def hook(name: str, given: tuple[Any, ...]) -> None:
        if name not in CALLS or not given:
            return
        writes = name != "open" or (
            len(given) > 2 and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and isinstance(given[0], str | os.PathLike) and os.fspath(given[0]).startswith(root):
            event()

    sys.addaudithook(hook)


def watch_lines(event: Callable[[], bool]) -> None:
    """Call a function before every line. If it returns True, half of the line is written and the process dies."""
    append = files.append_line

    def half(path: Path, line: str) -> None:
        if event():
            with path.open("ab", buffering=0) as file:
                file.write(line[: 1 + len(line) // 2].encode("ascii"))
            die()
        append(path, line)

    files.append_line = half


def watch_states(event: Callable[[], bool]) -> None:
    """Call a function before every write of a state. If it returns True, half is written and the process dies."""
    write = files._ErrorRecorder.write

    def half(recorder: Any, data: Any) -> int:
        if event():
            recorder.file.write(bytes(data)[: len(data) // 2])
            recorder.file.flush()
            die()
        return write(recorder, data)

    files._ErrorRecorder.write = half  # type: ignore[assignment, method-assign]


def counting(kind: str, folder: Path, chosen: int | None) -> Callable[[], None]:
    """Return what prepares a process: it dies at an event of a kind, or counts those events into a file.

    chosen: the number of the event, counted from 0, or None to count them all.
    """

    def prepare() -> None:
        count = itertools.count()
        record = os.open(folder / f"{kind}.count", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def event() -> bool:
            number = next(count)
            if chosen is None:
                os.pwrite(record, str(number + 1).encode(), 0)
            return number == chosen

        def fatal_event() -> None:
            if event():
                die()

        if kind == "call":
            watch_calls(folder, fatal_event)
        elif kind == "line":
            watch_lines(event)
        elif kind == "state":
            watch_states(event)

    return prepare


def import_what_runs_import(command: str, data: Path, folder: Path) -> None:
    """Import every module that a run imports. Imports take longer than the small runs themselves."""
    folder.mkdir(parents=True)
    note = folder / "modules.txt"

    def prepare() -> None:
        exit_at_once = os._exit

        def write_and_exit(status: int) -> None:
            note.write_text("\n".join(sys.modules))
            exit_at_once(status)

        os._exit = write_and_exit  # type: ignore[assignment]

    wait(start(arguments(command, data, folder / "run"), folder, prepare))
    for name in note.read_text().splitlines():
        if name not in sys.modules:
            with suppress(Exception):  # some cannot be imported by themselves
                importlib.import_module(name)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what it wrote, how long it took, and how many events of each kind it had."""

    results: dict[str, Any]
    seconds: float
    events: dict[str, int]


def run_reference(command: str, data: Path, folder: Path) -> Reference:
    """Run a command without an interruption: once for its time, and once for each kind of event, to count them."""
    found, seconds, events = None, 0.0, {}
    for kind in ("moment", "call", "line", "state"):
        own = folder / kind
        own.mkdir(parents=True)
        begin = time.monotonic()
        status = wait(start(arguments(command, data, own / "run"), own, counting(kind, own, None)))
        if status not in (0, 3):
            raise SystemExit(f"{command} ended with {status}: {(own / 'printed.txt').read_text()}")
        if kind == "moment":
            seconds = time.monotonic() - begin
        else:
            events[kind] = int((own / f"{kind}.count").read_text() or 0)
        again = results(own / "run")
        if found is not None and again != found:
            raise SystemExit(f"{command} differs from one uninterrupted run to the next: {differing(found, again)}")
        found = again
    assert found is not None
    return Reference(found, seconds, events)


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the names of the files that are missing, surplus or different."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name, 0) != found.get(name, 0))


def complete_lines(folder: Path) -> dict[str, list[bytes]]:
    """Return the complete lines of finished images and epochs."""
    names = [name for name in ("images.jsonl", "epochs.jsonl") if (folder / name).is_file()]
    return {name: (folder / name).read_bytes().split(b"\n")[:-1] for name in names}


def kill(trial: Trial, reference: Reference, data: Path, folder: Path) -> dict[str, Any]:
    """Start a run, kill it, let it go on, and compare. Returns the record of the kill."""
    command, moment = arguments(trial.command, data, folder / "run"), trial.at * reference.seconds
    begin, died = time.monotonic(), False
    while not died:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if trial.kind == "moment":
            id = start(command, folder)
            if wait(id, moment) is None:
                os.kill(id, signal.SIGKILL)
                wait(id)
                died = True
            moment *= 0.9  # the run may have been faster than the uninterrupted one
        else:
            status = wait(start(command, folder, counting(trial.kind, folder, int(trial.at))))
            if status != -signal.SIGKILL:
                raise SystemExit(f"{trial} did not come to that event: {(folder / 'printed.txt').read_text()}")
            died = True
    killed = complete_lines(folder / "run")
    left = sorted(path.name for path in (folder / "run").iterdir()) if (folder / "run").is_dir() else []
    status = wait(start(command, folder))
    found = results(folder / "run") if (folder / "run").is_dir() else {}
    wrong = differing(reference.results, found)
    after = complete_lines(folder / "run")
    lost = [name for name, lines in killed.items() if not set(lines) <= set(after.get(name, ()))]
    return {
        "command": trial.command,
        "kind": trial.kind,
        "at": round(trial.at, 3),
        "left": left,
        "lines": {name: len(lines) for name, lines in killed.items()},
        "status": status,
        "differing": wrong,
        "lost": lost,
        "identical": status in (0, 3) and not wrong and not lost,
        "seconds": round(time.monotonic() - begin, 2),
    }


def trials(count: int, seed: int, references: dict[str, Reference]) -> Iterator[Trial]:
    """Draw kills. The commands take turns."""
    generator = random.Random(seed)
    commands = list(references)
    for number in range(count):
        command = commands[number % len(commands)]
        events = references[command].events
        kinds = [kind for kind in KINDS if events.get(kind, 1)]
        (kind,) = generator.choices(kinds, [KINDS[kind] for kind in kinds])
        at = generator.random() if kind == "moment" else float(generator.randrange(events[kind]))
        yield Trial(command, kind, at)


def run(count: int, seed: int, commands: Sequence[str], root: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of each kill. root: an empty folder."""
    data = write_pictures(root / "pictures")
    for command in commands:
        import_what_runs_import(command, data, root / f"imports of {command}")
    references = {command: run_reference(command, data, root / command) for command in commands}
    for number, trial in enumerate(trials(count, seed, references)):
        yield {"kill": number} | kill(trial, references[trial.command], data, root / "killed")


def main() -> int:
    """Read the arguments, run, and print the records. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=["ttt", "eft", "fft"])
    options = parser.parse_args()
    same = total = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        for record in run(options.count, options.seed, options.commands, Path(root)):
            total, same = total + 1, same + bool(record["identical"])
            print(json.dumps(record), flush=True)
            print(f"{total}/{options.count} kills, {same} identical", file=sys.stderr, flush=True)
    print(json.dumps({"kills": total, "identical": same}), flush=True)
    return int(same < total)


if __name__ == "__main__":
    sys.exit(main())
