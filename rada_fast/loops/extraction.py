"""The command features: images are encoded once, into a file that every command reads as features:FILE.npz."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.inference import FeaturesOptions
from rada_fast.data.feature_writer import write_feature_file
from rada_fast.data.sources import Source
from rada_fast.errors import UserError
from rada_fast.loops.identity import deciding_options, identity_of_code, prompt_identity
from rada_fast.loops.setup import meet_neighbours, open_sources
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import iterate_views
from rada_fast.models.vision_language import VisionLanguageModel, open_model
from rada_fast.reports.summary import RunFacts, already_finished, finish
from rada_fast.runs.folder import Inputs, RunFolder
from rada_fast.runs.machine import reset_peak_memory
from rada_fast.runs.progress import Counts, progress
from rada_fast.system import notices, patience

IMAGES, ROWS, FEATURES, TEXT = "images.jsonl", "features.rows", "features.npz", "text.npz"
ENCODED_VIEWS = 64
"""About how many views are encoded at once."""


def run_features(options: FeaturesOptions) -> dict[str, Any]:
    """Encode the images of the data, and write their features and the summary. Returns the summary.

    The rows are appended to a file of their own as they are encoded, so an interrupted run encodes no image twice.

    Raises UserError naming an option that cannot be used.
    """
    patience.set_limit(options.run.timeout)
    source = open_sources({"data": options.data})["data"]
    if not source.holds_images:
        raise UserError(f"data must be images to be encoded, {options.data} holds features")
    model = open_model(options.model, needed=True, seed=options.run.seed).loaded()
    meet_neighbours(options.run, model.device)
    names: tuple[str, ...] | None = None
    if source.has_classes or options.text.classes is not None:
        names = class_names_of(source, options.text.classes, prompts=options.prompts)
    elif options.prompts:
        raise UserError(f"classes must be given for prompts: {options.data} has no classes")
    chosen = source.limited(options.run.limit)
    deciding = deciding_options(dataclasses.asdict(options))
    deciding["model"] |= {"device": model.device.type, "precision": model.precision}
    identity = {
        "command": "features",
        **identity_of_code(),
        "options": deciding,
        "model": model.fingerprint,
        "class_names": names,
        "templates": prompt_identity(options.text.templates) if options.prompts else None,
    }
    inputs = Inputs({"data": chosen.stamps()}, frozenset({"data"}))
    named = [options.model.pretrained, options.text.classes, *options.text.templates]
    with RunFolder(options.run, identity, inputs, [source.path], _paths(named)) as folder:
        notices.release()
        scope = {"images": len(chosen.ids)}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=len(chosen.ids))
        reset_peak_memory()
        start = time.perf_counter()
        resumed = encode_all(chosen, model, options, names, folder)
        if options.prompts:
            assert names is not None
            write_text_file(names, model, options, folder)
        unreadable = write_features(chosen, model, options, names, folder)
        results = {
            "images": len(chosen.ids),
            "views": options.views,
            "width": model.embed_dim,
            "unreadable": unreadable,
            "data": f"features:{folder.path / FEATURES}",
            "time": {"seconds": round(time.perf_counter() - start, 3)},
        }
        scale = {"value": model.logit_scale, "from": f"model {model.name}"}
        facts = RunFacts("features", dataclasses.asdict(options), None, model.facts(), scale)
        summary = finish(folder, facts, results, scope=scope, resumed=resumed)
        folder.remove(ROWS)
        return summary


def encode_all(
    source: Source, model: VisionLanguageModel, options: FeaturesOptions, names: Sequence[str] | None, folder: RunFolder
) -> int:
    """Encode every image that no earlier run has encoded, and append its features and a line.

    Returns the number of images that an earlier run had finished.
    """
    dtype, size = getattr(torch, options.dtype), options.views * model.embed_dim
    width = size * dtype.itemsize
    labels = source.known_labels()
    # A line without its row, or a row without its line, comes from an interruption.
    lines, whole = [], folder.size_of(ROWS) // width
    for line in folder.read_lines(IMAGES):
        if line["status"] == "unreadable" or line["row"] < whole:
            lines.append(line)
    count = sum(line["status"] == "ok" for line in lines)
    folder.write_lines(IMAGES, lines)
    folder.truncate(ROWS, count * width)
    done = {line["id"] for line in lines}
    samples = [sample for sample in source.samples if sample.id not in done]
    stream = iterate_views(
        samples, model, views=options.views, kind=options.view_kind, seed=options.run.seed, workers=options.run.workers
    )
    per_batch = max(1, ENCODED_VIEWS // options.views)
    with progress("encode", len(samples), before=Counts(len(done))) as advance:
        for batch in _batches(stream, per_batch):
            readable = [(index, views) for index, views, _ in batch if views is not None]
            encoded: dict[int, Tensor] = {}
            if readable:
                ids = [samples[index].id for index, views in readable for _ in range(len(views))]
                parts = _parts(torch.cat([views for _, views in readable]))
                rows = torch.cat([model.encode_images(part, ids[first : first + len(part)]) for first, part in parts])
                rows = rows.view(len(readable), size).cpu().to(dtype)
                if not bool(rows.isfinite().all()):
                    raise UserError(f"dtype {options.dtype} cannot hold these features; give float32")
                encoded = {index: row for (index, _), row in zip(readable, rows, strict=True)}
                folder.append_bytes(ROWS, rows.contiguous().view(torch.uint8).numpy().tobytes())
            for index, _, reason in batch:
                id, label = samples[index].id, labels[samples[index].id]
                line = {"id": id, "label": label, "label_name": names[label] if names and label is not None else None}
                if index in encoded:
                    folder.append(IMAGES, line | {"status": "ok", "row": count})
                    count += 1
                else:
                    folder.append(IMAGES, line | {"status": "unreadable", "error": reason})
                advance(readable=index in encoded)
    if not count:
        raise UserError(f"data {options.data}: none of the {len(source.ids)} images could be read")
    return len(done)


def _batches(stream: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield the elements of a stream in lists."""
    batch = []
    for one in stream:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _parts(views: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield views in parts that are encoded at once, each with the index of its first view."""
    for first in range(0, len(views), ENCODED_VIEWS):
        yield first, views[first : first + ENCODED_VIEWS]


def write_features(
    source: Source, model: VisionLanguageModel, options: FeaturesOptions, names: Sequence[str] | None, folder: RunFolder
) -> int:
    """Write the feature file, with its rows in the order of the data. Returns the number of unreadable images."""
    lines = folder.read_lines(IMAGES)
    row_of = {line["id"]: line["row"] for line in lines if line["status"] == "ok"}
    ids = [id for id in source.ids if id in row_of]
    dtype = getattr(torch, options.dtype)
    size = len(row_of) * options.views * model.embed_dim
    # The file is mapped, so that features larger than the memory can be written.
    flat = torch.from_file(str(folder.path / ROWS), shared=False, size=size, dtype=dtype)
    rows = flat.view(len(row_of), options.views, model.embed_dim)
    order = [row_of[id] for id in ids]
    if order != sorted(order):
        rows = rows[order]
    known = source.known_labels()
    labels = None
    if source.has_classes:
        labels = torch.tensor([known[id] for id in ids], dtype=torch.int64)
    write_feature_file(
        folder.path / FEATURES,
        rows[:, 0] if options.views == 1 else rows,
        labels,
        ids=ids,
        class_names=names,
        logit_scale=model.logit_scale,
    )
    return len(lines) - len(row_of)


def write_text_file(
    names: Sequence[str], model: VisionLanguageModel, options: FeaturesOptions, folder: RunFolder
) -> None:
    """Write the text features of the classes, one row for each."""
    (text,) = text_features(options.text, [ClassGroup(names, data=options.data)], model)
    write_feature_file(
        folder.path / TEXT, text, torch.arange(len(names)), class_names=names, logit_scale=model.logit_scale
    )


def _paths(named: Sequence[str | None]) -> list[Path]:
    """Return the values of options that may name files."""
    return [Path(name).expanduser() for name in named if name]
