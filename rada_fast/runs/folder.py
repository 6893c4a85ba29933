"""The folder of one run: what it is, a JSON line for everything finished, a summary; safe to interrupt and go on.

One process at a time writes there. Nothing that a run did not make is ever removed, and a folder that holds anything
else is no place for a new run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import resource
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rada_fast import _env
from rada_fast._version import __version__
from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.modules.checkpoint import stored_form
from rada_fast.runs.lock import FolderLock
from rada_fast.system import files, notices, termination

FORMAT = "rada_fast.run.v1"
IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE = "run.json", "run.lock", "summary.json"
SUPERSEDED = "images-superseded.jsonl"
"""Lines of images that have changed or gone since."""

_EVERY_RUN = (IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE, "images.jsonl")
_STAGES = ("rada", "rada-ft")
MADE_BY: dict[str, frozenset[str]] = {
    "ttt": frozenset({*_EVERY_RUN, SUPERSEDED}),
    "eft": frozenset({*_EVERY_RUN, "epochs.jsonl", "state.pt", "state-previous.pt", "adapter.safetensors"}),
    "fft": frozenset(
        {*_EVERY_RUN, "epochs.jsonl"}
        | {f"{stage}{end}.pt" for stage in _STAGES for end in ("", "-previous")}
        | {f"{stage}-{what}.safetensors" for stage in _STAGES for what in ("adapter", "model")}
    ),
}
"""The files that a run of each command makes: all that is ever removed."""
_DAMAGED = re.compile(r"(?P<name>.+)\.damaged(-\d+)?")


@dataclass(frozen=True)
class Inputs:
    """What a run reads, by the part that it plays: each file's stamp, or an array's hash, by id.

    parts: all of them; deciding: names of those that decide what the run has computed so far; a change in another, as
    in images that are tested at the end, only means that this has to be done anew.
    """

    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    deciding: frozenset[str] = frozenset()


class RunFolder:
    """Results of one run, locked against other processes until it is closed; use it as a context.

    options: output folder, and whether another run's results there may be removed.
    identity: every option and value that changes a result, with the command.
    inputs: the files that do.
    data: folders of images that the run reads; given: files and folders that its options name.

    Raises UserError where the folder holds another run's results or anything else, or another process runs in it.
    """

    def __init__(
        self,
        options: RunOptions,
        identity: Mapping[str, Any],
        inputs: Inputs | None = None,
        data: Sequence[Path] = (),
        given: Sequence[Path] = (),
    ) -> None:
        self.path = Path(options.output).expanduser()
        self.inputs = inputs or Inputs()
        self._identity = json.loads(json.dumps(identity))
        self._given = given
        _check_apart(self.path, data)
        self._check(options.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path / LOCK_FILE)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise  # the disk's fault, not the option's
            raise UserError(f"output {self.path} cannot be written: {error.strerror}") from None
        try:
            # Once more, as another process may have begun in between.
            stored = self._check(options.overwrite)
            self._clean(stored)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def _check(self, overwrite: bool) -> dict[str, Any] | None:
        """What run.json says of the run here, or None where there is none. Raises UserError; changes nothing."""
        if not self.path.is_dir():
            if self.path.exists() or self.path.is_symlink():
                raise UserError(f"output {self.path} must be a folder, it is a file")
            return None
        stored = self._stored()
        if stored is not None and self._same(stored):
            return stored
        if stored is None or overwrite:
            command = stored["identity"]["command"] if stored else None
            if foreign := [name for name in _names(self.path) if not _made(name, command)]:
                raise UserError(
                    f"output {self.path} must be empty, new, or hold nothing but a run's results, it holds "
                    f"{_some(foreign)}; give another --output"
                )
            place = self.path.resolve()
            if read := [str(path) for path in self._given if place in (path.resolve(), *path.resolve().parents)]:
                raise UserError(f"output {self.path} cannot be overwritten by a run that reads {_some(read)} in it")
            return stored
        changed = sorted(_differences(stored["identity"], self._identity))
        for part in sorted(self.inputs.deciding):
            if change := describe_change(stored["inputs"].get(part, {}), self.inputs.parts.get(part, {})):
                changed.append(f"{part}, {change}")
        raise UserError(
            f"output {self.path} holds another run's results (differing: {'; '.join(changed[:6])}); "
            "give another --output, or --overwrite to remove them"
        )

    def _same(self, stored: dict[str, Any]) -> bool:
        """Whether what is stored is this run's, so that it goes on."""
        return stored["identity"] == self._identity and not any(
            stored["inputs"].get(part, {}) != self.inputs.parts.get(part, {}) for part in self.inputs.deciding
        )

    def _clean(self, stored: dict[str, Any] | None) -> None:
        """Remove what killed processes left behind and, where another run is overwritten, its files."""
        command = stored["identity"]["command"] if stored else None
        for name in _names(self.path):
            if files.PARTIAL.fullmatch(name) and _made(name, command):
                files.remove(self.path / name)
        self.resumed = stored is not None and self._same(stored)
        if stored is not None and not self.resumed:
            for name in _names(self.path):
                # The identity goes last: until then the folder is known to be a run's.
                if name not in (IDENTITY_FILE, LOCK_FILE):
                    files.remove(self.path / name)
        self.before: Mapping[str, Mapping[str, str]] = stored["inputs"] if stored and self.resumed else {}
        if not self.resumed:
            self._write_identity()

    def accept_inputs(self) -> None:
        """Record that what the folder holds is of the inputs as they are now; a summary of other ones goes."""
        if self.before != self.inputs.parts:
            files.remove(self.path / SUMMARY_FILE)
            self._write_identity()

    def _write_identity(self) -> None:
        files.write_text(
            self.path / IDENTITY_FILE,
            json.dumps({"format": FORMAT, "identity": self._identity, "inputs": self.inputs.parts}, indent=1) + "\n",
        )
        self.before = self.inputs.parts

    def _stored(self) -> dict[str, Any] | None:
        path = self.path / IDENTITY_FILE
        try:
            if path.exists() and not path.is_file():  # a FIFO would be waited for
                raise ValueError
            stored = json.loads(path.read_text(encoding="ascii"))
            known = stored["format"] == FORMAT and stored["identity"]["command"] in MADE_BY
            if known and isinstance(stored["inputs"], dict):
                return dict(stored)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"output {self.path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UserError(
            f"output {self.path} holds a {IDENTITY_FILE} that no run of this program made or that is damaged; "
            "nothing is removed: give another --output"
        )

    def finished(self, covers: Mapping[str, Any]) -> dict[str, Any] | None:
        """The summary of this very run over these very inputs, where it has ended before. covers: see digest."""
        path = self.path / SUMMARY_FILE
        try:
            if not path.is_file():
                return None
            summary = json.loads(path.read_text(encoding="ascii"))
            complete = all(
                (self.path / name).is_file() and size in (None, (self.path / name).stat().st_size)
                for name, size in summary.get("files", {}).items()
            )
            return dict(summary) if self.resumed and complete and summary["run"] == self.digest(covers) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, whole or not at all; its entry "run" is a digest(), "files" what left() says."""
        write_json(self.path / SUMMARY_FILE, summary)

    def left(self) -> dict[str, int | None]:
        """The lines and weights that the run leaves, these with their size: without them it is not finished."""
        found = [path for path in sorted(self.path.iterdir()) if path.suffix in (".safetensors", ".jsonl")]
        return {path.name: path.stat().st_size if path.suffix == ".safetensors" else None for path in found}

    def digest(self, covers: Mapping[str, Any]) -> str:
        """A hash of what a summary is about: identity, inputs, and covers, what else decides it, such as a limit."""
        everything = json.dumps([self._identity, self.inputs.parts, covers], sort_keys=True)
        return hashlib.sha256(everything.encode()).hexdigest()[:32]

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The records finished so far. A last line torn by a crash is cut off the file.

        A file with a damaged line elsewhere is set aside, and its whole lines are written anew.
        """
        path = self.path / name
        if not path.is_file():
            return []
        content = path.read_bytes()
        *whole, torn = content.split(b"\n")
        records = [_record(line) for line in whole]
        # Damaged lines at the end are a torn write's too, whatever the file system made of it.
        while records and records[-1] is None:
            torn = whole.pop() + b"\n" + torn
            records.pop()
        good = [record for record in records if record is not None]
        if len(good) < len(records):
            aside = self._set_aside(path)
            notices.warn(f"{path} has {len(records) - len(good)} damaged lines; it was kept as {aside.name}")
            self.write_lines(name, good)
        elif torn:
            os.truncate(path, len(content) - len(torn))
        return good

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line; it is with the operating system before this returns."""
        # What a signal has cut off, the reading of an image for one, must not be recorded as if it were the image's.
        termination.raise_if_asked()
        files.append_line(self.path / name, _line(record))

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a whole file of lines, or leave it as it is where it holds just these."""
        content = "".join(f"{_line(record)}\n" for record in records)
        path = self.path / name
        if not path.is_file() or path.read_bytes() != content.encode("ascii"):
            files.write_text(path, content)

    def supersede(self, name: str, kept: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> None:
        """Take lines out of a file whose other lines are kept, into images-superseded.jsonl."""
        if old:
            earlier = self.read_lines(SUPERSEDED)
            known = {_line(record) for record in earlier}
            self.write_lines(SUPERSEDED, [*earlier, *(record for record in old if _line(record) not in known)])
            self.write_lines(name, kept)

    def save_adapter(self, name: str, adapter: RationalAdapter) -> None:
        """Write an adapter for load_adapter to read."""
        files.write_tensors(self.path / name, *stored_form(adapter))

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors."""
        files.write_tensors(self.path / name, tensors)

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values under a name ending in .pt; the state before stays as NAME-previous.pt."""
        files.write_state(self.path / name, state, previous=self._previous(name))

    def load_state(self, name: str, use: Callable[[dict[str, Any]], None]) -> bool:
        """Hand the newest usable state of a name to use(), without executing code. Returns whether there was one.

        use: raises anything where the state does not fit, before it has changed anything. What is damaged or does not
        fit is set aside, with a warning, and the state before it is taken.
        """
        for path in (self.path / name, self._previous(name)):
            if not path.is_file():
                continue
            try:
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        raise ValueError(f"the checksum of {part} is another one")
                state = torch.load(path, map_location="cpu", weights_only=True)
                use(state)
            except Exception as error:  # a damaged archive fails in any of zipfile's, zlib's and torch's ways
                termination.raise_if_asked()  # which torch.load may have taken for such damage
                aside = self._set_aside(path)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
                reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
                notices.warn(
                    f"state {path} is damaged ({reason}) and was set aside as {aside.name}; the run goes on from the "
                    "one before it, or from the start where there is none"
                )
            else:
                return True
        return False

    def _previous(self, name: str) -> Path:
        return self.path / f"{name.removesuffix('.pt')}-previous.pt"

    def _set_aside(self, path: Path) -> Path:
        """Give a damaged file another name, which nothing has yet."""
        new, count = path.with_name(f"{path.name}.damaged"), 1
        while new.exists():
            count += 1
            new = path.with_name(f"{path.name}.damaged-{count}")
        files.rename(path, new)
        return new


def _check_apart(output: Path, data: Sequence[Path]) -> None:
    """Raise UserError where results would lie among the images."""
    place = output.resolve()
    for folder in data:
        root = folder.resolve()
        if root == place or root in place.parents:
            raise UserError(
                f"output {output} must lie outside of the data folder {folder}, where results would be taken for data"
            )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _made(name: str, command: str | None) -> bool:
    """Whether a run of a command made a file of this name; None: a run that was killed before it said what it is."""
    known = MADE_BY[command] if command is not None else frozenset({LOCK_FILE})
    if name in known:
        return True
    if match := files.PARTIAL.fullmatch(name):
        return match["name"] in known | {IDENTITY_FILE}
    return (match := _DAMAGED.fullmatch(name)) is not None and match["name"] in known


def describe_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """What was added, removed and replaced between two listings; empty where nothing was."""
    changes = {
        "added": [id for id in new if id not in old],
        "removed": [id for id in old if id not in new],
        "replaced": [id for id, stamp in new.items() if id in old and old[id] != stamp],
    }
    return "; ".join(f"{what}: {_some(ids)}" for what, ids in changes.items() if ids)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    more = len(names) - most
    return ", ".join(ascii(name)[1:-1] for name in names[:most]) + (f" and {more} more" if more > 0 else "")


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None where the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _line(record: Mapping[str, Any]) -> str:
    """A record as JSON; it is ASCII, so that file names in any encoding make readable lines."""
    return json.dumps(record, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    files.write_text(path, json.dumps(value, indent=2) + "\n")


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Options with both values, or dotted names of other entries, in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in set(old) | set(new):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        if not name.startswith("options."):
            yield name.replace("_", " ")
            return
        option = "--" + name.rpartition(".")[2].replace("_", "-")
        before, now = ("not given" if value is None else json.dumps(value) for value in (old, new))
        yield f"{option} {before} there, {now} here"


def versions() -> dict[str, str]:
    """Versions of what computes the results."""
    found = {"rada_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "open_clip_torch", "triton", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reset_peak_memory() -> None:
    """Start counting the GPU's peak memory anew; the process's own peak only ever grows."""
    if _env.has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Peak memory so far, in MiB: of the process, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if _env.has_cuda():
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak
