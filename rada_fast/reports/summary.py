"""The report of a run: a record of each image, the accuracies over the records, the summary, and its table."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import RunOptions
from rada_fast.ops import resolve_backend
from rada_fast.runs.contents import EVALUATED
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.heartbeat import HEARTBEAT_FILE
from rada_fast.runs.machine import peak_memory, versions
from rada_fast.system import notices, ranks
from rada_fast.system.terminal import PlainConsole, print_json, table


def image_record(
    id: str, label: int | None, status: str, before: Tensor, after: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Return the record of one image: its class, and the five best classes before and after adaptation.

    id, label: the name of the image, and the number of its class if it is known.
    status: "ok", or "diverged" if adaptation failed and the answer after it is the one before it.
    before, after: the zero-shot and the adapted logits (K,). Classes with equal logits are ranked by their numbers.
    names: the names of the K classes.

    The record has the numbers of the classes and their names. Its entry "confidence" is the largest softmax probability
    before and after.
    """
    best_before, best_after = (ranking(logits) for logits in (before, after))
    return {
        "id": id,
        **label_entries(label, names),
        "status": status,
        "zero_shot": best_before,
        "zero_shot_names": [names[index] for index in best_before],
        "adapted": best_after,
        "adapted_names": [names[index] for index in best_after],
        "confidence": [round(float(logits.softmax(-1).max()), 6) for logits in (before, after)],
    }


def label_entries(label: int | None, names: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a record that say what class its image has: a number and a name, or None for both."""
    return {"label": label, "label_name": None if label is None else names[label]}


def unreadable_records(images: Iterable[tuple[str, int, str]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record of each image that could not be read.

    images: their ids, their labels and the reasons; names: the names of the classes that the labels count.
    """
    return [
        {"id": id, **label_entries(label, names), "status": "unreadable", "error": reason}
        for id, label, reason in images
    ]


def is_image_record(record: Mapping[str, Any], label: int | None) -> bool:
    """Return whether a record read from a file is complete and belongs to an image with this label."""
    status = record.get("status")
    rankings = [record.get(name) for name in ("zero_shot", "adapted")]
    ranked = all(isinstance(best, list) and best and all(type(k) is int for k in best) for best in rankings)
    return record.get("label", "") == label and (status == "unreadable" or (status in ("ok", "diverged") and ranked))


def ranking(logits: Tensor, count: int = 5) -> list[int]:
    """Return the classes of the largest logits, the best first. Equal logits are ranked by class number.

    logits: (K,); count: how many classes to return.
    """
    order: list[int] = logits.argsort(descending=True, stable=True)[:count].tolist()
    return order


def accuracy_of(records: Sequence[dict[str, Any]], *, before: str, after: str) -> dict[str, Any]:
    """Count records, and compute the accuracies in percent before and after adaptation.

    before, after: the entries of a record that hold the two rankings of classes.

    An unreadable image counts as a wrong answer and is never left out.
    """
    labelled = [record for record in records if record["label"] is not None]
    counts = {
        status: sum(record["status"] == status for record in records) for status in ("ok", "diverged", "unreadable")
    }
    result: dict[str, Any] = {"images": len(records), "status": counts}
    for name in (before, after):
        for k in (1, 5):
            right = sum(record["label"] in record.get(name, [])[:k] for record in labelled)
            result[f"{name}_top{k}"] = percent(right, len(labelled))
    return result


def percent(right: int, total: int) -> float | None:
    """Return the accuracy in percent, or None if there are no images."""
    return round(100 * right / total, 3) if total else None


@dataclass(frozen=True)
class RunFacts:
    """The set-up of a run, as its summary states it.

    command: the name of the command.
    options: all options with their values.
    adapter: the configuration of the rational adapter, or None if the method of the run has none.
    model: the name and the properties of the model, or None if the run has no model.
    logit_scale: the multiplier s, and where it comes from.
    origin: the facts about the run that trained the adapter with which this run starts, or None.
    """

    command: str
    options: Mapping[str, Any]
    adapter: AdapterConfig | None
    model: Mapping[str, Any] | None
    logit_scale: Mapping[str, Any]
    origin: Mapping[str, Any] | None = None


def finish(
    folder: RunFolder, facts: RunFacts, results: dict[str, Any], *, scope: Mapping[str, Any], resumed: int
) -> dict[str, Any]:
    """Write the summary of a run, with its set-up and its results, and return it. All ranks must call this.

    folder: the folder of the run.
    facts: the set-up of the run.
    results: the entries that are particular to the command.
    scope: values that decide the results beside the identity and the inputs of the run; see RunFolder.digest.
    resumed: how many images or epochs an earlier run had already finished.
    """
    group = ranks.current()
    for warnings in group.all_gather(notices.so_far()):
        for warning in warnings:
            notices.warn(warning)  # the first rank has not printed those of the others
    summary = {
        "command": facts.command,
        "preset": None if facts.adapter is None else facts.adapter.preset,
        **results,
        "resumed": resumed,
        "warnings": notices.so_far(),
        "peak_memory": _largest(group.all_gather(peak_memory())),
        "backend": resolve_backend(),
        "model": facts.model,
        "logit_scale": facts.logit_scale,
        "adapter": None if facts.adapter is None else facts.adapter.to_dict(),
        "origin": facts.origin,
        "config": facts.options,
        "versions": versions(),
        "output": str(folder.path),
        "files": folder.result_files(),
        "run": folder.digest(scope),
    }
    folder.write_summary(summary)
    folder.release()
    folder.log("result", results)
    return summary


def _largest(peaks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the peak memory of the process that has needed the most, by the kind of memory."""
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}


def already_finished(folder: RunFolder, summary: dict[str, Any], *, resumed: int) -> dict[str, Any]:
    """Print that the run has already finished, and return the summary that it wrote then, with the times of then."""
    notices.note(f"this run is finished: {folder.path} holds its results, and nothing was computed again")
    # The run may have been killed right after it wrote the summary.
    folder.remove(EVALUATED)
    folder.remove(HEARTBEAT_FILE)
    return summary | {"resumed": resumed, "output": str(folder.path)}  # the folder may have been moved


def harmonic_mean(base: float | None, new: float | None) -> float | None:
    """Return the harmonic mean of two accuracies in percent, or None if one of them is missing."""
    if base is None or new is None:
        return None
    return round(2 * base * new / (base + new), 3) if base + new else 0.0


def show(summary: dict[str, Any], options: RunOptions) -> int:
    """Print a summary as a table or as JSON. Returns the exit status of the command."""
    if options.json:
        print_json(summary)
    else:
        console = PlainConsole()
        rows = [(name, value) for name, value in _flat(summary) if name.partition(" ")[0] not in _NOT_IN_TABLE]
        console.print(table(f"rada-fast {summary['command']}", rows))
        console.print(f"results in {summary['output']}", soft_wrap=True)
    unreadable = summary["unreadable"]
    if unreadable > options.allow_unreadable:
        named = {
            "predict": "predictions.jsonl names them",
            "features": "images.jsonl names them, and they have no features",
        }.get(summary["command"], "images.jsonl names them, and those to be tested count as wrong")
        print(
            f"rada-fast: {unreadable} images could not be read; {named} (--allow-unreadable {unreadable} accepts them)",
            file=sys.stderr,
        )
        return 3
    return 0


_NOT_IN_TABLE = {"command", "config", "files", "versions", "adapter", "origin", "model", "output", "warnings", "run"}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the entries of nested dictionaries, each with a readable name made of all its keys."""
    for name, entry in value.items():
        title = f"{prefix} {name}".strip().replace("_", " ")
        if isinstance(entry, dict):
            yield from _flat(entry, title)
        else:
            yield title, entry
