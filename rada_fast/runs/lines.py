"""Files of JSON lines, one record in each: a line that is cut off or damaged is never taken for a record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rada_fast.system import files, notices, termination


def read(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file of lines. If a crash left the last line incomplete, it is cut off the file.

    A file with a damaged line elsewhere gets another name, and its undamaged lines are written to a new file.
    """
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
        aside = files.set_aside(path)
        notices.warn(f"{path} has {len(records) - len(good)} damaged lines; it was kept as {aside.name}")
        write(path, good)
    elif incomplete:
        os.truncate(path, len(content) - len(incomplete))
    return good


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line. The operating system has the whole line before this returns."""
    # If a signal has interrupted the reading of an image, the error must not be recorded as a fault of the image.
    termination.raise_if_asked()
    files.append_line(path, _line(record))


def append_all(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add a line for each of one or more records, in a single write."""
    termination.raise_if_asked()
    files.append_line(path, "\n".join(map(_line, records)))


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of lines. A file that already holds exactly these lines is not written again."""
    content = "".join(f"{_line(record)}\n" for record in records)
    if not path.is_file() or path.read_bytes() != content.encode("ascii"):
        files.write_text(path, content)


def supersede(
    path: Path, kept: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]], superseded: Path
) -> None:
    """Move the old records of a file to another one, so that the file holds the kept ones alone."""
    if old:
        earlier = read(superseded)
        known = {_line(record) for record in earlier}
        write(superseded, [*earlier, *(record for record in old if _line(record) not in known)])
        write(path, kept)


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
