"""What a run is: every option, file and value that decides one of its numbers, and the folder that belongs to it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rada_fast.data.fingerprints import tensor_fingerprint
from rada_fast.data.sources import Source
from rada_fast.loops.setup import Problem
from rada_fast.models.class_features import resolve_templates
from rada_fast.modules import RationalAdapter
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.system import notices

NOT_DECIDING = ("output", "workers", "limit", "overwrite", "allow_unreadable", "json", "episodes", "order_seed")
"""Options that change where and how a run goes, and no number; a limit decides where a command says so."""


def open_folder(
    command: str,
    problem: Problem,
    read: Mapping[str, Source],
    *,
    deciding: Collection[str],
    names: Sequence[str],
    text: Tensor,
    limit: int | None = None,
) -> RunFolder:
    """The run's folder, locked; what it holds of this run is kept, and another run's is refused or overwritten.

    read: all data that the run reads, by the part that each plays; deciding: the parts that decide what is computed
    before the end, so that the run cannot go on where they have changed; names, text: all classes' names and T;
    limit: of the images that are trained on, None where all are.

    Raises UserError where the folder cannot be used.
    """
    inputs = Inputs({part: source.stamps() for part, source in read.items()}, frozenset(deciding))
    data = [source.path for source in problem.sources.values() if source.holds_images]
    identity = identity_of(command, problem, names, text, limit)
    folder = RunFolder(problem.config.run, identity, inputs, data, given_paths(problem))
    # Nothing that was given can be refused any more.
    notices.release()
    return folder


def given_paths(problem: Problem) -> list[Path]:
    """What the options name that may be a file or a folder, and a tag or a template as well."""
    config = problem.config
    text = (config.text.text_features or "").partition(":")[2]
    named = (config.adapter.adapter, config.model.pretrained, config.text.classes, config.text.templates, text)
    return [Path(name).expanduser() for name in named if name]


def identity_of(
    command: str, problem: Problem, names: Sequence[str], text: Tensor, limit: int | None
) -> dict[str, Any]:
    """Everything but the data that decides a run's numbers."""
    config, adapter = problem.config, problem.adapter
    options = _deciding_options(dataclasses.asdict(config))
    # Another device of the same kind computes the same.
    options["model"]["device"] = problem.device.type
    if problem.vlm is not None:
        # What was used: another processor may compute otherwise what the same option asks for.
        options["model"]["precision"] = problem.vlm.precision
    if limit is not None:
        options["run"]["limit"] = limit
    given = config.text.text_features
    return {
        "command": command,
        "options": options,
        "adapter": {**adapter.config.to_dict(), "preset": adapter.config.preset},
        # A new adapter follows from the seed; one from a file is known by its weights.
        "adapter_file": adapter_fingerprint(adapter) if config.adapter.adapter is not None else None,
        "model": problem.vlm.fingerprint if problem.vlm is not None else None,
        "logit_scale": problem.logit_scale,
        # What prompts are made of, as another processor may round T itself differently.
        "class_names": list(names) if given is None else None,
        "templates": list(resolve_templates(config.text.templates)) if given is None else None,
        "text_features": tensor_fingerprint(text) if given not in (None, "class-means") else None,
    }


def _deciding_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _deciding_options(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if name not in NOT_DECIDING
    }


def adapter_fingerprint(adapter: RationalAdapter) -> str:
    """A short hash of an adapter's configuration and weights."""
    digest = hashlib.sha256(repr(adapter.config).encode())
    for name, tensor in adapter.state_dict().items():
        digest.update(f"{name} {tensor_fingerprint(tensor)}".encode())
    return digest.hexdigest()[:16]
