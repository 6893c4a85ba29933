"""The folder of one run: the identity of the run, a JSON line for each finished image or epoch, and a summary.

A run can be interrupted at any time and goes on from what its folder holds. One process at a time writes there. Only
files that a run has made are ever removed, and a new run does not start in a folder that holds other files.
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
from rada_fast.config.methods import FFT_STAGES
from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.modules.checkpoint import stored_form
from rada_fast.runs.lock import FolderLock
from rada_fast.runs.sinks import SINKS, Sink, log_to, open_sinks, remove_events
from rada_fast.system import files, notices, termination

FORMAT = "rada_fast.run.v1"
IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE = "run.json", "run.lock", "summary.json"
SUPERSEDED = "images-superseded.jsonl"
"""The file of the lines of images that were changed or removed after the lines were written."""

_EVERY_RUN = (IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE, "images.jsonl", *SINKS)
FILES_OF_COMMAND: dict[str, frozenset[str]] = {
    "ttt": frozenset({*_EVERY_RUN, SUPERSEDED}),
    "eft": frozenset(
        {*_EVERY_RUN, "epochs.jsonl", "state.pt", "state-previous.pt", "adapter.safetensors", "method.safetensors"}
    ),
    "eval": frozenset(_EVERY_RUN),
    "predict": frozenset({*_EVERY_RUN, "predictions.jsonl", "predictions.csv"}),
    "features": frozenset({*_EVERY_RUN, "features.rows", "features.npz", "text.npz"}),
    "fft": frozenset(
        {*_EVERY_RUN, "epochs.jsonl"}
        | {f"{stage}{end}.pt" for stage in FFT_STAGES for end in ("", "-previous")}
        | {f"{stage}-{what}.safetensors" for stage in FFT_STAGES for what in ("adapter", "model")}
    ),
}
"""The names of the files that a run of each command makes. Files with other names are never removed."""
_ENSEMBLE = re.compile(r"ensemble-[-+.e\d]+-(adapter|model)\.safetensors")
"""The names of the files in which fft stores means of weights; a share is part of the name."""
_DAMAGED = re.compile(r"(?P<name>.+)\.damaged(-\d+)?")


@dataclass(frozen=True)
class Inputs:
    """The files that a run reads, in parts such as "train" and "test".

    parts: for each part, the stamp of every file, or the hash of every array, by its id.
    deciding: the parts that decide what the run has computed so far. If another part changes, such as the images of the
        evaluation at the end, only the work on that part is repeated.
    """

    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    deciding: frozenset[str] = frozenset()


class RunFolder:
    """The results of one run on disk. The folder is locked against other processes until the context ends.

    options: these name the output folder, and say whether another run's results there may be removed.
    identity: the command, and every option and value that changes a result.
    inputs: the files that change a result.
    data: the folders of images that the run reads.
    option_paths: the files and folders that the options name.

    Raises UserError if the folder holds another run's results or other files, or if another process runs in it.
    """

    def __init__(
        self,
        options: RunOptions,
        identity: Mapping[str, Any],
        inputs: Inputs | None = None,
        data: Sequence[Path] = (),
        option_paths: Sequence[Path] = (),
    ) -> None:
        self.path = Path(options.output).expanduser()
        self.inputs = inputs or Inputs()
        self._identity = json.loads(json.dumps(identity))
        self._option_paths = option_paths
        self._sinks: list[Sink] = []
        self.finished_epochs = 0
        _check_outside_data(self.path, data)
        self._check(options.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path / LOCK_FILE)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise  # the disk is at fault, not the option
            raise UserError(f"output {self.path} cannot be written: {error.strerror}") from None
        try:
            # The check is repeated because another process may have started since the first one.
            stored = self._check(options.overwrite)
            self._clean(stored)
            self._sinks = open_sinks(options.log, self.path, self._identity)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, so that another process can use the folder."""
        try:
            for sink in self._sinks:
                sink.close()
        finally:
            self._lock.release()

    def log(self, group: str, record: Mapping[str, Any]) -> None:
        """Give numbers to the programs that draw them, at the number of finished epochs; see log_to."""
        log_to(self._sinks, group, record, self.finished_epochs)

    def _check(self, overwrite: bool) -> dict[str, Any] | None:
        """Return the content of run.json, or None if the folder has none. This changes nothing.

        Raises UserError if this run cannot use the folder.
        """
        if not self.path.is_dir():
            if self.path.exists() or self.path.is_symlink():
                raise UserError(f"output {self.path} must be a folder, it is a file")
            return None
        stored = self._read_identity()
        if stored is not None and self._is_this_run(stored):
            return stored
        if stored is None or overwrite:
            command = stored["identity"]["command"] if stored else None
            if foreign := [name for name in _names(self.path) if not _is_made_by(name, command)]:
                raise UserError(
                    f"output {self.path} must be empty, new, or hold nothing but a run's results, it holds "
                    f"{_first_of(foreign)}; give another --output"
                )
            output = self.path.resolve()
            read = [str(path) for path in self._option_paths if output in (path.resolve(), *path.resolve().parents)]
            if read:
                raise UserError(f"output {self.path} cannot be overwritten by a run that reads {_first_of(read)} in it")
            return stored
        changed = sorted(_differences(stored["identity"], self._identity))
        for part in sorted(self.inputs.deciding):
            if change := describe_change(stored["inputs"].get(part, {}), self.inputs.parts.get(part, {})):
                changed.append(f"{part}, {change}")
        raise UserError(
            f"output {self.path} holds another run's results (differing: {'; '.join(changed[:6])}); "
            "give another --output, or --overwrite to remove them"
        )

    def _is_this_run(self, stored: dict[str, Any]) -> bool:
        """Return whether the stored identity and inputs are those of this run, so that it can go on."""
        return stored["identity"] == self._identity and not any(
            stored["inputs"].get(part, {}) != self.inputs.parts.get(part, {}) for part in self.inputs.deciding
        )

    def _clean(self, stored: dict[str, Any] | None) -> None:
        """Remove the files that killed processes left behind and, if another run is overwritten, its files."""
        command = stored["identity"]["command"] if stored else None
        for name in _names(self.path):
            if files.PARTIAL.fullmatch(name) and _is_made_by(name, command):
                files.remove(self.path / name)
        self.resumed = stored is not None and self._is_this_run(stored)
        if stored is not None and not self.resumed:
            for name in _names(self.path):
                # The identity is replaced last, so that until then the folder is known to belong to a run.
                if (self.path / name).is_dir():
                    remove_events(self.path / name)
                elif name not in (IDENTITY_FILE, LOCK_FILE):
                    files.remove(self.path / name)
        self.stored_inputs: Mapping[str, Mapping[str, str]] = stored["inputs"] if stored and self.resumed else {}
        if not self.resumed:
            self._write_identity()

    def accept_inputs(self) -> None:
        """Record that the results are those of the present inputs, and remove a summary of earlier inputs."""
        if self.stored_inputs != self.inputs.parts:
            files.remove(self.path / SUMMARY_FILE)
            self._write_identity()

    def _write_identity(self) -> None:
        files.write_text(
            self.path / IDENTITY_FILE,
            json.dumps({"format": FORMAT, "identity": self._identity, "inputs": self.inputs.parts}, indent=1) + "\n",
        )
        self.stored_inputs = self.inputs.parts

    def _read_identity(self) -> dict[str, Any] | None:
        """Read run.json. Returns None without one; raises UserError if no run wrote it or it cannot be read."""
        path = self.path / IDENTITY_FILE
        try:
            if path.exists() and not path.is_file():  # reading a FIFO could wait for ever
                raise ValueError
            stored = json.loads(path.read_text(encoding="ascii"))
            known = stored["format"] == FORMAT and stored["identity"]["command"] in FILES_OF_COMMAND
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

    def finished_summary(self, scope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the summary if this run has already finished with the same inputs, or None. scope: see digest."""
        path = self.path / SUMMARY_FILE
        try:
            if not path.is_file():
                return None
            summary = json.loads(path.read_text(encoding="ascii"))
            complete = all(
                (self.path / name).is_file() and size in (None, (self.path / name).stat().st_size)
                for name, size in summary.get("files", {}).items()
            )
            return dict(summary) if self.resumed and complete and summary["run"] == self.digest(scope) else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json as a whole or not at all.

        summary: its entry "run" is the result of digest(), and its entry "files" that of result_files().
        """
        write_json(self.path / SUMMARY_FILE, summary)

    def result_files(self) -> dict[str, int | None]:
        """Return the sizes of the weight files by name, and the names of the files of lines, each with None.

        A run with a summary counts as finished only while these files exist.
        """
        found = [path for path in sorted(self.path.iterdir()) if path.suffix in (".safetensors", ".npz", ".jsonl")]
        return {path.name: None if path.suffix == ".jsonl" else path.stat().st_size for path in found}

    def digest(self, scope: Mapping[str, Any]) -> str:
        """Return a hash of everything that decides a summary: the identity of the run, its inputs, and the scope.

        scope: further values that decide the summary, such as a limit on the number of images.
        """
        everything = json.dumps([self._identity, self.inputs.parts, scope], sort_keys=True)
        return hashlib.sha256(everything.encode()).hexdigest()[:32]

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read the records of a file of lines. If a crash left the last line incomplete, it is cut off the file.

        A file with a damaged line elsewhere gets another name, and its undamaged lines are written to a new file.
        """
        path = self.path / name
        if not path.is_file():
            return []
        content = path.read_bytes()
        *complete, incomplete = content.split(b"\n")
        records = [_record(line) for line in complete]
        # Damaged lines at the end also come from an incomplete write, whatever the file system made of it.
        while records and records[-1] is None:
            incomplete = complete.pop() + b"\n" + incomplete
            records.pop()
        good = [record for record in records if record is not None]
        if len(good) < len(records):
            aside = self._set_aside(path)
            notices.warn(f"{path} has {len(records) - len(good)} damaged lines; it was kept as {aside.name}")
            self.write_lines(name, good)
        elif incomplete:
            os.truncate(path, len(content) - len(incomplete))
        return good

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line. The operating system has the whole line before this returns."""
        # If a signal has interrupted the reading of an image, the error must not be recorded as a fault of the image.
        termination.raise_if_asked()
        files.append_line(self.path / name, _line(record))

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a whole file of lines. A file that already holds exactly these lines is not written again."""
        content = "".join(f"{_line(record)}\n" for record in records)
        path = self.path / name
        if not path.is_file() or path.read_bytes() != content.encode("ascii"):
            files.write_text(path, content)

    def write_table(self, name: str, text: str) -> None:
        """Write a text in UTF-8 as a whole file, such as a table for another program."""
        files.write_text(self.path / name, text, encoding="utf-8")

    def append_bytes(self, name: str, content: bytes) -> None:
        """Add bytes to a file. The operating system has all of them before this returns."""
        termination.raise_if_asked()
        with (self.path / name).open("ab") as file:
            file.write(content)

    def size_of(self, name: str) -> int:
        """Return the size of a file in bytes, or 0 if it does not exist."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else 0

    def truncate(self, name: str, size: int) -> None:
        """Cut a file off at a size in bytes. Creates the file if it does not exist."""
        with (self.path / name).open("ab") as file:
            file.truncate(size)

    def remove(self, name: str) -> None:
        """Remove a file that the run needs no more."""
        files.remove(self.path / name)

    def supersede(self, name: str, kept: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> None:
        """Move the old records of a file to images-superseded.jsonl, so that the file holds the kept ones alone."""
        if old:
            earlier = self.read_lines(SUPERSEDED)
            known = {_line(record) for record in earlier}
            self.write_lines(SUPERSEDED, [*earlier, *(record for record in old if _line(record) not in known)])
            self.write_lines(name, kept)

    def save_adapter(self, name: str, adapter: RationalAdapter) -> None:
        """Write an adapter in the form that load_adapter reads."""
        files.write_tensors(self.path / name, *stored_form(adapter))

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
        """Write tensors in the format of safetensors. header: texts for the header of the file."""
        files.write_tensors(self.path / name, tensors, header)

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values to a file NAME.pt, and keep the one before it as NAME-previous.pt."""
        files.write_state(self.path / name, state, previous=self._previous(name))

    def load_state(self, name: str, use: Callable[[dict[str, Any]], None]) -> bool:
        """Read the newest usable state of a name, without executing code, and call use() with it.

        use: a function that raises an exception if the state does not fit, before it changes anything. A file that is
        damaged or does not fit gets another name, with a warning, and the state before it is tried.

        Returns whether there was a usable state.
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
        """Give a damaged file a name that no other file has, and return its new path."""
        new, count = path.with_name(f"{path.name}.damaged"), 1
        while new.exists():
            count += 1
            new = path.with_name(f"{path.name}.damaged-{count}")
        files.rename(path, new)
        return new


def _check_outside_data(output: Path, data: Sequence[Path]) -> None:
    """Raise UserError if the output folder lies in a data folder."""
    resolved = output.resolve()
    for folder in data:
        root = folder.resolve()
        if root == resolved or root in resolved.parents:
            raise UserError(
                f"output {output} must lie outside of the data folder {folder}, where results would be taken for data"
            )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _is_made_by(name: str, command: str | None) -> bool:
    """Return whether a run of a command makes a file of this name.

    command: None stands for a run that was killed before it wrote its identity.
    """
    known = FILES_OF_COMMAND[command] if command is not None else frozenset({LOCK_FILE})

    def is_result(name: str) -> bool:
        return name in known or (command == "fft" and _ENSEMBLE.fullmatch(name) is not None)

    if is_result(name):
        return True
    if match := files.PARTIAL.fullmatch(name):
        return is_result(match["name"]) or match["name"] == IDENTITY_FILE
    return (match := _DAMAGED.fullmatch(name)) is not None and is_result(match["name"])


def describe_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describe which entries were added, removed or replaced between two listings, or return an empty text."""
    changes = {
        "added": [id for id in new if id not in old],
        "removed": [id for id in old if id not in new],
        "replaced": [id for id, stamp in new.items() if id in old and old[id] != stamp],
    }
    return "; ".join(f"{what}: {_first_of(ids)}" for what, ids in changes.items() if ids)


def _first_of(names: Sequence[str], count: int = 3) -> str:
    """Return the first few names as one text, with the number of the others."""
    more = len(names) - count
    return ", ".join(ascii(name)[1:-1] for name in names[:count]) + (f" and {more} more" if more > 0 else "")


def _record(line: bytes) -> dict[str, Any] | None:
    """Parse the record of a line. Returns None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _line(record: Mapping[str, Any]) -> str:
    """Return a record as JSON in ASCII, so that the line is readable whatever the encoding of file names is."""
    return json.dumps(record, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, as a whole or not at all."""
    files.write_text(path, json.dumps(value, indent=2) + "\n")


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield the entries in which two JSON values differ: options with both values, other entries by name alone."""
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
    """Return the versions of Python and of the packages that compute the results."""
    found = {"rada_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "open_clip_torch", "triton", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def reset_peak_memory() -> None:
    """Reset the peak of the GPU memory. The peak of the process's own memory cannot be reset."""
    if _env.has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far in MiB: that of the process, and that of the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if _env.has_cuda():
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak
