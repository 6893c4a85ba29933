"""The identity of a run, which is every option, file and value that decides its numbers, and the folder of the run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rada_fast import _env
from rada_fast.config.commands import FFTOptions
from rada_fast.data.fingerprints import tensor_fingerprint
from rada_fast.data.sources import Source
from rada_fast.loops.setup import Setup
from rada_fast.models.prompts import OF_DATASET, resolve_prompts
from rada_fast.modules import RationalAdapter
from rada_fast.ops import resolve_backend
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.runs.machine import code_version
from rada_fast.runs.shards import open_run_folder
from rada_fast.system import notices, ranks

NON_IDENTITY_OPTIONS = (
    "output",
    "workers",
    "limit",
    "overwrite",
    "allow_unreadable",
    "allow_chance",
    "timeout",
    "exclusive",
    "profile",
    "json",
    "log",
    "memory",
    "episodes",
    "order_seed",
    "sets",
    "seeds",
    "root",
    "ensemble",
    "save_every",
    "shard",
)
"""Options that change where a run writes or how it proceeds, but no number. The limit is added back if it matters."""


def open_folder(
    setup: Setup,
    read: Mapping[str, Source],
    *,
    deciding: Collection[str],
    names: Sequence[str],
    text: Tensor,
    limit: int | None = None,
) -> RunFolder:
    """Open and lock the folder of a run, once for all ranks. Earlier results of the same run are kept.

    setup: the set-up of the run.
    read: all data that the run reads, by part ("train", "test", ...).
    deciding: the parts that decide what is computed before the end. If one of them changes, the run cannot go on.
    names: the names of all classes.
    text: the text features of all classes.
    limit: the largest number of training images, or None if all images are used.

    Raises UserError if the folder cannot be used, such as one with another run's results and no --overwrite.
    """
    paths, identity = option_paths(setup), identity_of(setup, names, text, limit)
    inputs = Inputs({part: source.stamps() for part, source in read.items()}, frozenset(deciding))
    data = [source.path for source in setup.sources.values() if source.holds_images]
    folder = open_run_folder(ranks.current(), setup.options.run, identity, inputs, data, paths)
    # From here on, no option can be refused any more.
    notices.release()
    return folder


def option_paths(setup: Setup) -> list[Path]:
    """Return the values of options that may name a file or a folder. Some may be a tag or a template instead."""
    options = setup.options
    text, files = ((value or "").partition(":")[2] for value in (options.text.text_features, options.model.model))
    model = (files, options.model.pretrained)
    named = (options.adapter.adapter, *model, options.text.classes, *options.text.templates, text)
    return [Path(name).expanduser() for name in named if name]


def identity_of(setup: Setup, names: Sequence[str], text: Tensor, limit: int | None) -> dict[str, Any]:
    """Collect everything except the data that decides the numbers of a run. The arguments are those of open_folder."""
    adapter, model, text_options = setup.adapter, setup.model, setup.options.text
    options = deciding_options(dataclasses.asdict(setup.options))
    # Another device of the same type computes the same numbers.
    options["model"]["device"] = setup.device.type
    # The precision in use decides. Another processor may use another precision for the same option.
    options["model"]["precision"] = model.precision
    if limit is not None:
        options["run"]["limit"] = limit
    # The parts of a training's step decide how sums are rounded. In test-time training, memory decides no number.
    if isinstance(setup.options, FFTOptions) and setup.options.memory is not None:
        options["memory"] = setup.options.memory
    prompts = text_options.text_features is None
    return {
        "command": setup.command,
        **identity_of_code(),
        "options": options,
        "adapter": {**adapter.config.to_dict(), "preset": adapter.config.preset},
        # The seed decides a new adapter; an adapter from a file is recognised by its weights.
        "adapter_file": _adapter_file_identity(setup),
        "model": model.fingerprint,
        "logit_scale": setup.logit_scale,
        # The words of the prompts are compared instead of T, because another processor may round T differently.
        "class_names": list(names) if prompts else None,
        "templates": prompt_identity(text_options.templates) if prompts else None,
        "text_features": tensor_fingerprint(text) if text_options.text_features not in (None, "class-means") else None,
    }


def identity_of_code() -> dict[str, Any]:
    """Return what decides numbers beside options and files: the version, the backend, and how it multiplies."""
    # Each backend rounds in its own way, and so does each way to multiply.
    arithmetic = {
        "backend": resolve_backend(),
        "float32_products": _env.float32_products(),
        "bfloat16_products": _env.bfloat16_products(),
    }
    return {"code": code_version(), "arithmetic": arithmetic}


def prompt_identity(values: Sequence[str]) -> list[str]:
    """Return what tells whether the prompts that the option --templates names are still the same.

    The template of a data set follows from the option that names the data.
    """
    others = [value for value in values if value != OF_DATASET]
    return resolve_prompts(others).identity() if others else []


def deciding_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that decide its numbers, in their groups."""
    return {
        name: deciding_options(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if name not in NON_IDENTITY_OPTIONS
    }


def _adapter_file_identity(setup: Setup) -> str | None:
    """Return what tells whether the weights that the option --adapter names are still the same."""
    if setup.options.adapter.adapter is None:
        return None
    found = adapter_fingerprint(setup.adapter)
    return found if setup.trained is None else f"{found} {setup.trained.stored.fingerprint}"


def adapter_fingerprint(adapter: RationalAdapter) -> str:
    """Return a short hash of the configuration and the weights of an adapter."""
    digest = hashlib.sha256(repr(adapter.config).encode())
    for name, tensor in adapter.state_dict().items():
        digest.update(f"{name} {tensor_fingerprint(tensor)}".encode())
    return digest.hexdigest()[:16]
