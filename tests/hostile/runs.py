"""Hostile folders of runs."""

from __future__ import annotations

from pathlib import Path

import torch

from rada_fast import cli
from tests.hostile.planting import VICTIM, Evil, case, evil_zip, features, given, quiet, ttt


def started_run(folder: Path) -> list[str]:
    """Train an adapter, take its results away, and return the arguments that go on."""
    values = {
        "train": features(folder), "test": features(folder), "text-features": f"features:{folder}/text.npz",
        "logit-scale": 50, "protocol": "all", "epochs": 2,
    }  # fmt: skip
    arguments = ["eft", *given(folder, values)]
    with quiet():
        assert cli.main(arguments) == 0
    (folder / "out" / "summary.json").unlink()
    return arguments


@case("run: a pickled state", 0)
def _(folder: Path) -> list[str]:
    arguments = started_run(folder)
    torch.save({"trained": Evil()}, folder / "out" / "state.pt")
    evil_zip(folder / "out" / "state-previous.pt")
    return arguments


for label, names in {
    "a file of lines": ("images.jsonl",),
    "several": ("epochs.jsonl", "images.jsonl", "state.pt"),
}.items():

    @case(f"run: links in place of {label}")
    def _(folder: Path, names: tuple[str, ...] = names) -> list[str]:
        arguments = started_run(folder)
        for name in names:
            (folder / "out" / name).unlink()
            (folder / "out" / name).symlink_to(VICTIM)
        return arguments


@case("run: a link in a new folder")
def _(folder: Path) -> list[str]:
    arguments = ttt(folder)
    (folder / "out").mkdir()
    (folder / "out" / "images.jsonl").symlink_to(VICTIM)
    return arguments


@case("run: a link to a lock")
def _(folder: Path) -> list[str]:
    arguments = ttt(folder)
    (folder / "out").mkdir()
    (folder / "out" / "run.lock").symlink_to(VICTIM)
    return arguments


@case("run: links, overwritten")
def _(folder: Path) -> list[str]:
    arguments = started_run(folder)
    (folder / "out" / "images.jsonl").unlink()
    (folder / "out" / "images.jsonl").symlink_to(VICTIM)
    return [*arguments, "--overwrite", "--lr", "0.5"]


@case("run: an identity nested without end")
def _(folder: Path) -> list[str]:
    arguments = started_run(folder)
    (folder / "out" / "run.json").write_text('{"format": "rada_fast.run.v1", "identity":' + "[" * 200_000)
    return arguments


@case("report: a summary nested without end")
def _(folder: Path) -> list[str]:
    started_run(folder)
    (folder / "out" / "summary.json").write_text("[" * 200_000)
    return ["report", str(folder / "out"), "--output", str(folder / "report")]


@case("status: files nested without end", 0, 2)
def _(folder: Path) -> list[str]:
    started_run(folder)
    for name in ("summary.json", "progress.json", "images.jsonl", "run.json"):
        (folder / "out" / name).write_text("[" * 200_000 + "\n")
    return ["status", str(folder / "out")]
