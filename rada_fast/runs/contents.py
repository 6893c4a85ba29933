"""The names of the files that runs make, by which a run knows what it may remove."""

from __future__ import annotations

import re
from pathlib import Path

from rada_fast.config.methods import FFT_STAGES
from rada_fast.runs.heartbeat import HEARTBEAT_FILE
from rada_fast.runs.sinks import SINKS
from rada_fast.system import files

FORMAT = "rada_fast.run.v1"
IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE = "run.json", "run.lock", "summary.json"
EVALUATED = "evaluated.jsonl"
"""The file of the records of an evaluation that is under way. It is removed at the end of the run."""
SUPERSEDED = "images-superseded.jsonl"
"""The file of the lines of images that were changed or removed after the lines were written."""

TRACES = ("trace.json.gz", "trace.txt")
"""The files of the option --profile: the trace, and the table of operators."""

INSPECTION = (
    "inspect.html", "inspect.json", "mask.png", "heat-maps.png", "class-averages.png", "projection.png", "classes.png",
    "reliability.png",
)  # fmt: skip
"""The files of the command inspect: its page, the numbers, and the pictures."""

_EVERY_RUN = (IDENTITY_FILE, LOCK_FILE, SUMMARY_FILE, HEARTBEAT_FILE, *TRACES, "images.jsonl", *SINKS)
FILES_OF_COMMAND: dict[str, frozenset[str]] = {
    "ttt": frozenset({*_EVERY_RUN, SUPERSEDED}),
    "eft": frozenset(
        {*_EVERY_RUN, "epochs.jsonl", "state.pt", "state-previous.pt", "adapter.safetensors", "method.safetensors"}
        | {EVALUATED}
    ),
    "eval": frozenset({*_EVERY_RUN, EVALUATED}),
    "inspect": frozenset({*_EVERY_RUN, EVALUATED, *INSPECTION}),
    "predict": frozenset({*_EVERY_RUN, "predictions.jsonl", "predictions.csv"}),
    "features": frozenset({*_EVERY_RUN, "features.rows", "features.npz", "text.npz"}),
    "fft": frozenset(
        {*_EVERY_RUN, "epochs.jsonl", EVALUATED}
        | {f"{stage}{end}.pt" for stage in FFT_STAGES for end in ("", "-previous")}
        | {f"{stage}-{what}.safetensors" for stage in FFT_STAGES for what in ("adapter", "model")}
    ),
}
"""The names of the files that a run of each command makes. Files with other names are never removed."""
_ENSEMBLE = re.compile(r"ensemble-[-+.e\d]+-(adapter|model)\.safetensors")
"""The names of the files in which fft stores means of weights; a share is part of the name."""
_TRACE_OF_STAGE = re.compile(rf"({'|'.join(FFT_STAGES)})-trace\.(json\.gz|txt)")
_DAMAGED = re.compile(r"(?P<name>.+)\.damaged(-\d+)?")
OF_RANK = re.compile(r"(?P<stem>images|predictions|run|progress)\.rank-(?P<rank>\d{4,})(?P<ending>\.(jsonl|json|lock))")
"""The names of the files that each of several processes has for itself; see shards.py."""


def name_of_rank(name: str, rank: int) -> str:
    """Return the name of a process's own file instead of that of a process alone, such as images.rank-0003.jsonl."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.rank-{rank:04}.{ending}"


def names_in(folder: Path) -> list[str]:
    """Return the names of everything in a folder."""
    return sorted(path.name for path in folder.iterdir())


def is_made_by(name: str, command: str | None) -> bool:
    """Return whether a run of a command makes a file of this name.

    command: None stands for a run that was killed before it wrote its identity.
    """
    known = FILES_OF_COMMAND[command] if command is not None else frozenset({LOCK_FILE})

    def is_result(name: str) -> bool:
        if match := OF_RANK.fullmatch(name):
            name = match["stem"] + match["ending"]
        of_fft = command == "fft" and (_ENSEMBLE.fullmatch(name) or _TRACE_OF_STAGE.fullmatch(name))
        return name in known or bool(of_fft)

    if is_result(name):
        return True
    if match := files.PARTIAL.fullmatch(name):
        return is_result(match["name"]) or match["name"] == IDENTITY_FILE
    return (match := _DAMAGED.fullmatch(name)) is not None and is_result(match["name"])
