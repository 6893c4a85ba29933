"""The folder of one run: the identity of the run, a JSON line for each finished image or epoch, and a summary.

A run can be interrupted at any time and goes on from what its folder holds. One process at a time writes there. Only
files that a run has made are ever removed, and a new run does not start in a folder that holds other files.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.modules.checkpoint import stored_form
from rada_fast.runs import heartbeat, lines, machine, states
from rada_fast.runs.changes import describe_change, describe_change_of_values, differences, first_of
from rada_fast.runs.contents import (
    EVALUATED,
    FILES_OF_COMMAND,
    FORMAT,
    IDENTITY_FILE,
    LOCK_FILE,
    SUMMARY_FILE,
    SUPERSEDED,
    is_made_by,
    names_in,
)
from rada_fast.runs.lock import FolderLock
from rada_fast.runs.sinks import Sink, log_to, open_sinks, remove_events
from rada_fast.system import files, neighbours, notices, termination


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

    def _begin(
        self, options: RunOptions, identity: Mapping[str, Any], inputs: Inputs | None, option_paths: Sequence[Path]
    ) -> None:
        """Keep the arguments of the constructor, before the folder is touched."""
        self.path = Path(options.output).expanduser()
        self.inputs = inputs or Inputs()
        self._identity = json.loads(json.dumps(identity))
        self._option_paths = option_paths
        self._sinks: list[Sink] = []
        self._releases: list[Callable[[], object]] = []
        self.finished_epochs = 0

    def __init__(
        self,
        options: RunOptions,
        identity: Mapping[str, Any],
        inputs: Inputs | None = None,
        data: Sequence[Path] = (),
        option_paths: Sequence[Path] = (),
    ) -> None:
        self._begin(options, identity, inputs, option_paths)
        _check_outside_data(self.path, data)
        self._check(options.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path / LOCK_FILE)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise  # the disk is at fault, not the option
            raise UserError(f"output {self.path} cannot be written: {error.strerror}") from None
        self._heartbeat = heartbeat.begin(self.path)
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
        """Release the lock, so that another process can use the folder, and let other runs forget this one."""
        neighbours.leave()
        heartbeat.end(self._heartbeat)
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
        if link := next((path for path in sorted(self.path.iterdir()) if self._leads_out(path)), None):
            raise UserError(
                f"output {self.path} holds {link.name}, which is a link; nothing is written through links: give "
                "another --output"
            )
        if stored is not None and self._is_this_run(stored):
            return stored
        if stored is None or overwrite:
            command = stored["identity"]["command"] if stored else None
            if foreign := [name for name in names_in(self.path) if not is_made_by(name, command)]:
                raise UserError(
                    f"output {self.path} must be empty, new, or hold nothing but a run's results, it holds "
                    f"{first_of(foreign)}; give another --output"
                )
            output = self.path.resolve()
            read = [str(path) for path in self._option_paths if output in (path.resolve(), *path.resolve().parents)]
            if read:
                raise UserError(f"output {self.path} cannot be overwritten by a run that reads {first_of(read)} in it")
            return stored
        command, own = stored["identity"].get("command"), self._identity["command"]
        if command != own:
            raise UserError(
                f"output {self.path} holds the results of another command ({command} there, {own} here); "
                "give another --output, or --overwrite to remove them"
            )
        changed = sorted(differences(stored["identity"], self._identity))
        for part in sorted(self.inputs.deciding):
            if change := describe_change(stored["inputs"].get(part, {}), self.inputs.parts.get(part, {})):
                changed.append(f"{part}, {change}")
        raise UserError(
            f"output {self.path} holds another run's results (differing: {'; '.join(changed[:6])}); "
            "give another --output, or --overwrite to remove them"
        )

    def _leads_out(self, path: Path) -> bool:
        """Return whether a file of the folder is a link through which this run would write to another place."""
        return path.is_symlink() and is_made_by(path.name, self._identity["command"])

    def _is_this_run(self, stored: dict[str, Any]) -> bool:
        """Return whether the stored identity and inputs are those of this run, so that it can go on."""
        return stored["identity"] == self._identity and not any(
            stored["inputs"].get(part, {}) != self.inputs.parts.get(part, {}) for part in self.inputs.deciding
        )

    def _clean(self, stored: dict[str, Any] | None) -> None:
        """Remove the files that killed processes left behind and, if another run is overwritten, its files."""
        command = stored["identity"]["command"] if stored else None
        for name in names_in(self.path):
            if files.PARTIAL.fullmatch(name) and is_made_by(name, command):
                files.remove(self.path / name)
        self.resumed = stored is not None and self._is_this_run(stored)
        if stored is not None and not self.resumed:
            for name in names_in(self.path):
                # The identity is replaced last, so that until then the folder is known to belong to a run.
                if (self.path / name).is_dir():
                    remove_events(self.path / name)
                elif name not in (IDENTITY_FILE, LOCK_FILE):
                    files.remove(self.path / name)
        self.stored_inputs: Mapping[str, Mapping[str, str]] = stored["inputs"] if stored and self.resumed else {}
        here = machine.made_by()
        earlier = stored.get("made_by", []) if stored and self.resumed else []
        self._made_by = earlier if here in earlier else [*earlier, here]
        if not self.resumed:
            self._write_identity(self.inputs.parts)
        elif len(self._made_by) > len(earlier) and not (self.path / SUMMARY_FILE).exists():
            if changed := describe_change_of_values(earlier[-1] if earlier else {}, here):
                notices.warn(
                    f"output {self.path} was begun with other versions or on another machine, so that numbers may "
                    f"differ in their last digits: {changed}"
                )
            self._write_identity(self.stored_inputs)

    def accept_inputs(self) -> None:
        """Record that the results are those of the present inputs, and remove a summary of earlier inputs."""
        if self.stored_inputs != self.inputs.parts:
            files.remove(self.path / SUMMARY_FILE)
            self._write_identity(self.inputs.parts)

    def _write_identity(self, inputs: Mapping[str, Mapping[str, str]]) -> None:
        content = {"format": FORMAT, "identity": self._identity, "made_by": self._made_by, "inputs": inputs}
        files.write_text(self._writable(IDENTITY_FILE), json.dumps(content, indent=1) + "\n")
        self.stored_inputs = inputs

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

    def _writable(self, name: str) -> Path:
        """Return the path of a file that is about to be written. Raises OSError if the folder is not there any more."""
        self._lock.check_place()
        return self.path / name

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
        files.write_json(self._writable(SUMMARY_FILE), summary)
        self._heartbeat.remove()  # the summary says everything

    def result_files(self) -> dict[str, int | None]:
        """Return the sizes of the weights, pictures and pages by name, and the names of the files of lines with None.

        A run with a summary counts as finished only while these files exist.
        """
        kept = [path for path in sorted(self.path.iterdir()) if path.name != EVALUATED]
        found = [path for path in kept if path.suffix in (".safetensors", ".npz", ".jsonl", ".html", ".png")]
        return {path.name: None if path.suffix == ".jsonl" else path.stat().st_size for path in found}

    def digest(self, scope: Mapping[str, Any]) -> str:
        """Return a hash of everything that decides a summary: the identity of the run, its inputs, and the scope.

        scope: further values that decide the summary, such as a limit on the number of images.
        """
        everything = json.dumps([self._identity, self.inputs.parts, scope], sort_keys=True)
        return hashlib.sha256(everything.encode()).hexdigest()[:32]

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read the records of a file of lines, without a last line that was cut off; see lines.read."""
        return lines.read(self.path / name)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line. The operating system has the whole line before this returns."""
        lines.append(self._writable(name), record)

    def append_all(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Add a line for each of one or more records, in a single write."""
        lines.append_all(self._writable(name), records)

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a whole file of lines. A file that already holds exactly these lines is not written again."""
        lines.write(self._writable(name), records)

    def supersede(self, name: str, kept: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> None:
        """Move the old records of a file to images-superseded.jsonl, so that the file holds the kept ones alone."""
        lines.supersede(self._writable(name), kept, old, self.path / SUPERSEDED)

    def write_table(self, name: str, text: str) -> None:
        """Write a text in UTF-8 as a whole file, such as a table for another program."""
        files.write_text(self._writable(name), text, encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as a JSON file, as a whole or not at all."""
        files.write_json(self._writable(name), value)

    def write_by(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file by a function that writes to the path it is given, such as that of a picture."""
        files.write_by(self._writable(name), write)

    def append_bytes(self, name: str, content: bytes) -> None:
        """Add bytes to a file. The operating system has all of them before this returns."""
        termination.raise_if_asked()
        files.append_bytes(self._writable(name), content)

    def size_of(self, name: str) -> int:
        """Return the size of a file in bytes, or 0 if it does not exist."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else 0

    def truncate(self, name: str, size: int) -> None:
        """Cut a file off at a size in bytes. Creates the file if it does not exist."""
        with self._writable(name).open("ab") as file:
            file.truncate(size)

    def when_stored(self, release: Callable[[], object]) -> None:
        """Note a function that removes what only unfinished work needs, for the next call of release."""
        self._releases.append(release)

    def release(self) -> None:
        """Call the functions that when_stored has noted, as the work of each of them is stored for good."""
        while self._releases:
            self._releases.pop()()

    def remove(self, name: str) -> None:
        """Remove a file that the run needs no more."""
        files.remove(self.path / name)

    def save_adapter(self, name: str, adapter: RationalAdapter) -> None:
        """Write an adapter in the form that load_adapter reads."""
        files.write_tensors(self._writable(name), *stored_form(adapter))

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
        """Write tensors in the format of safetensors. header: texts for the header of the file."""
        files.write_tensors(self._writable(name), tensors, header)

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors and plain values to a file NAME.pt, and keep the one before it as NAME-previous.pt."""
        states.save(self._writable(name), state)

    def load_state(self, name: str, use: Callable[[dict[str, Any]], None]) -> bool:
        """Read the newest usable state of a name, and call use() with it; see states.load."""
        return states.load(self.path / name, use)


def _check_outside_data(output: Path, data: Sequence[Path]) -> None:
    """Raise UserError if the output folder lies in a data folder."""
    resolved = output.resolve()
    for folder in data:
        root = folder.resolve()
        if root == resolved or root in resolved.parents:
            raise UserError(
                f"output {output} must lie outside of the data folder {folder}, where results would be taken for data"
            )
