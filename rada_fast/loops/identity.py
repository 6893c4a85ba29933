"""The identity of a run, which is every option, file and value that decides its numbers, and the folder for it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rada_fast.data.fingerprints import tensor_fingerprint
from rada_fast.data.sources import Source
from rada_fast.loops.setup import Setup
from rada_fast.models.class_features import resolve_templates
from rada_fast.modules import RationalAdapter
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.system import notices

NOT_DECIDING = ("output", "workers", "limit", "overwrite", "allow_unreadable", "json", "episodes", "order_seed")
"""Options that change where a run writes and how it proceeds, but no number. A command says where a limit decides."""


def open_folder(
    setup: Setup,
    read: Mapping[str, Source],
    *,
    deciding: Collection[str],
    names: Sequence[str],
    text: Tensor,
    limit: int | None = None,
) -> RunFolder:
    """The run's folder, locked. What it holds of this run is kept; another run's results are refused or overwritten.

    read: all data that the run reads, by the part that each plays; deciding: the parts that decide what is computed
    before the end, so that the run cannot go on where they have changed; names, text: the names and text features of
    all classes; limit: of the images that are trained on, None where all are.

    Raises UserError where the folder cannot be used.
    """
    given, identity = given_paths(setup), identity_of(setup, names, text, limit)
    inputs = Inputs({part: source.stamps() for part, source in read.items()}, frozenset(deciding))
    data = [source.path for source in setup.sources.values() if source.holds_images]
    folder = RunFolder(setup.options.run, identity, inputs, data, given)
    # Nothing that was given can be refused any more.
    notices.release()
    return folder


def given_paths(setup: Setup) -> list[Path]:
    """The values of options that may name a file or a folder; some may be a tag or a template instead."""
    options = setup.options
    text = (options.text.text_features or "").partition(":")[2]
    named = (options.adapter.adapter, options.model.pretrained, options.text.classes, options.text.templates, text)
    return [Path(name).expanduser() for name in named if name]


def identity_of(setup: Setup, names: Sequence[str], text: Tensor, limit: int | None) -> dict[str, Any]:
    """Everything but the data that decides a run's numbers; the arguments are those of open_folder."""
    adapter, model, given = setup.adapter, setup.model, setup.options.text
    options = _deciding_options(dataclasses.asdict(setup.options))
    # Another device of the same kind computes the same.
    options["model"]["device"] = setup.device.type
    # This is the precision in use: another processor may take another one for the same option.
    options["model"]["precision"] = model.precision
    if limit is not None:
        options["run"]["limit"] = limit
    prompts = given.text_features is None
    return {
        "command": setup.command,
        "options": options,
        "adapter": {**adapter.config.to_dict(), "preset": adapter.config.preset},
        # A new adapter follows from the seed; one from a file is recognised by its weights.
        "adapter_file": adapter_fingerprint(adapter) if setup.options.adapter.adapter is not None else None,
        "model": model.fingerprint,
        "logit_scale": setup.logit_scale,
        # The prompts' words are compared and not T itself, which another processor may round differently.
        "class_names": list(names) if prompts else None,
        "templates": list(resolve_templates(given.templates)) if prompts else None,
        "text_features": tensor_fingerprint(text) if given.text_features not in (None, "class-means") else None,
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
