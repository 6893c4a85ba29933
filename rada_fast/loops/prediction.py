"""The command predict: images without labels get names of classes, zero-shot, adapted, or by test-time training."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.inference import PredictOptions
from rada_fast.data.sources import Source
from rada_fast.engine.predictor import Prediction
from rada_fast.engine.stages import StageTimes
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import CHUNK_ELEMENTS, image_tuning, logits_of_rows, trained_text
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.trained import with_trained_weights
from rada_fast.loops.ttt import predictions as test_time_predictions
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.image_features import ENCODER_BATCH, Unreadable, iterate_features, iterate_views
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.summary import already_finished, finish, ranking
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.machine import reset_peak_memory
from rada_fast.runs.progress import Counts, progress
from rada_fast.runs.shards import merge, own_file, shared_counts
from rada_fast.system import notices, ranks
from rada_fast.system.ranks import Ranks

PREDICTIONS, TABLE = "predictions.jsonl", "predictions.csv"


def run_predict(options: PredictOptions) -> dict[str, Any]:
    """Predict every image of the data, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    group = ranks.current()
    setup = open_prediction(options)
    source = setup.sources["data"]
    # A line depends on its image alone, as in ttt.
    deciding = [] if source.holds_images else ["data"]
    with open_folder(setup, {"data": source}, deciding=deciding, names=setup.names, text=setup.text) as folder:
        chosen = source.limited(options.run.limit)
        kept = drop_changed(folder, chosen.ids) if group.first else {}
        folder.accept_inputs()
        scope = {"images": len(chosen.ids)}
        done = set(group.broadcast([place for place, id in enumerate(chosen.ids) if id in kept]))
        if len(done) == len(chosen.ids) and (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=len(done))
        reset_peak_memory()
        start = time.perf_counter()
        todo = _share_of([place for place in range(len(chosen.ids)) if place not in done], options, group)
        own_lines = own_file(PREDICTIONS, group)
        before = Counts(len(done)) if group.first else None
        with progress("predict", len(todo), before=before, gather=shared_counts(group)) as advance:
            with closing(predictions(setup, chosen, options, todo)) as found:
                for prediction in found:
                    folder.append(own_lines, line_of(prediction, setup.names, options.top))
                    advance(readable=prediction.status != "unreadable")
            group.all_gather(None, lambda: advance(0))
        records = _all_lines(folder, chosen.ids) if group.first else []
        folder.write_table(TABLE, as_csv(records))
        counts = {
            status: sum(record["status"] == status for record in records) for status in ("unreadable", "diverged")
        }
        results = {
            "images": len(chosen.ids),
            "classes": len(setup.names),
            "by": _way(setup, options),
            **group.broadcast(counts),
            "time": {"seconds": round(time.perf_counter() - start, 3)},
        }
        return finish(folder, setup.facts(), results, scope=scope, resumed=len(done))


def _share_of(todo: Sequence[int], options: PredictOptions, group: Ranks) -> list[int]:
    """Return the images that a rank predicts: single ones, or where they are encoded in batches, whole batches."""
    size = 1 if options.ttt else ENCODER_BATCH
    batches = [todo[first : first + size] for first in range(0, len(todo), size)]
    return [index for batch in group.share(batches) for index in batch]


def _all_lines(folder: RunFolder, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Bring the lines of all ranks into predictions.jsonl, and return the records of some images, in their order."""
    merge(folder.path)
    by_id = {record["id"]: record for record in folder.read_lines(PREDICTIONS)}
    chosen = {id: by_id[id] for id in ids}
    others = [record for id, record in by_id.items() if id not in chosen]
    folder.write_lines(PREDICTIONS, [*chosen.values(), *others])
    return list(chosen.values())


def _way(setup: Setup, options: PredictOptions) -> str:
    """Return what the answers come from, for the summary."""
    if options.ttt:
        return "test-time training"
    if setup.trained is not None:
        return f"method {setup.trained.stored.config.method}"
    return "zero-shot" if options.adapter.adapter is None else "adapter"


def open_prediction(options: PredictOptions) -> Setup:
    """Open the data, the model and the adapter. Raises UserError naming an option that cannot be used."""
    options, stored = with_trained_weights(options)
    opened = open_data_and_model(options, {"data": options.data})
    names = class_names_of(opened.sources["data"], options.text.classes, prompts=options.text.text_features is None)
    group = ClassGroup(names, data=options.data)
    (text,) = text_features(options.text, [group], opened.model, opened.text_file, uses_classifier=stored is not None)
    if not options.ttt:
        for name in ("views", "view_kind", "memory", "episodes", "episode"):
            if getattr(options, name) != getattr(PredictOptions, name):
                notices.warn(f"--{name.replace('_', '-')} has no use without --ttt")
    return open_setup("predict", options, opened, names, text, stored)


def drop_changed(folder: RunFolder, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Remove the lines of images that were changed or removed since, and return the others by the names of the images.

    ids: the names of all images of this run.
    """
    before, now = folder.stored_inputs.get("data", {}), folder.inputs.parts["data"]
    by_image = "data" not in folder.inputs.deciding
    known = frozenset(ids)
    records = folder.read_lines(PREDICTIONS)
    kept = {}
    for record in records:
        id = record.get("id")
        unchanged = id in known and (not by_image or before.get(str(id)) == now[str(id)])
        if unchanged and id not in kept and record.get("status") in ("ok", "diverged", "unreadable"):
            kept[str(id)] = record
    if len(kept) < len(records):
        folder.write_lines(PREDICTIONS, kept.values())
    return kept


def predictions(setup: Setup, source: Source, options: PredictOptions, todo: Sequence[int]) -> Generator[Prediction]:
    """Predict some images, and yield each as soon as it is predicted.

    setup: the set-up of the run.
    source: all images of the run.
    options: the options of the command.
    todo: the indices of the images to predict.
    """
    if options.ttt:
        return test_time_predictions(setup, source, options, todo, StageTimes())
    return _without_episodes(setup, source, todo)


def _without_episodes(setup: Setup, source: Source, todo: Sequence[int]) -> Generator[Prediction]:
    """Predict images with what was trained as it is, which gives the zero-shot answer where nothing was."""
    data = f"--data {source.path}"
    text, rows = trained_text(setup, source, setup.names, setup.text, data)
    tuning = image_tuning(setup, source, data)
    for indices, features, changed, unreadable in _both_features(setup, source, todo, tuning):
        for index, image in unreadable:
            yield Prediction(index, image.id, "unreadable", error=image.reason)
        if features is None or changed is None:
            continue
        with torch.no_grad():
            before = zero_shot_logits(features.to(setup.device), setup.text, setup.logit_scale).cpu()
            after = setup.head(changed.to(setup.device), text, setup.logit_scale).cpu()
            after = after if rows is None else logits_of_rows(after, rows)
        diverged = ~after.isfinite().all(dim=-1)
        after[diverged] = before[diverged]
        for row, index in enumerate(indices):
            label = int(after[row].argmax())
            yield Prediction(
                index, source.ids[index], "diverged" if bool(diverged[row]) else "ok", label, setup.names[label],
                after[row], before[row],
            )  # fmt: skip


def _both_features(
    setup: Setup, source: Source, todo: Sequence[int], tuning: EncoderTuning | None
) -> Iterator[tuple[list[int], Tensor | None, Tensor | None, list[tuple[int, Unreadable]]]]:
    """Yield what _features does, with the features that the image encoder computes with something inside it.

    tuning: what is inside it. Without it, both features of an image are the same.
    """
    plain = _features(setup, source, todo)
    if tuning is None:
        for indices, features, unreadable in plain:
            yield indices, features, features, unreadable
        return
    again = _features(setup, source, todo)
    for indices, features, unreadable in plain:
        with tuning.attached():
            same, changed, _ = next(again, ([], None, []))
        if same != indices:
            raise UserError(f"--data {source.path}: images have changed during the run, start it again")
        yield indices, features, changed, unreadable


def _features(
    setup: Setup, source: Source, todo: Sequence[int]
) -> Iterator[tuple[list[int], Tensor | None, list[tuple[int, Unreadable]]]]:
    """Yield indices of images, the features of those that can be read, and those that cannot."""
    chunk = max(1, CHUNK_ELEMENTS // setup.text.numel())
    if (views := source.views()) is not None:
        for first in range(0, len(todo), chunk):
            indices = list(todo[first : first + chunk])
            yield indices, views[indices, 0], []
        return
    samples, model = [source.samples[index] for index in todo], setup.model.loaded()
    stream = iterate_views(samples, model, views=1, kind="crop", seed=0, workers=setup.options.run.workers)
    place = {sample.id: index for sample, index in zip(samples, todo, strict=True)}
    for part in iterate_features(stream, samples, model):
        indices = [todo[index] for index in part.indices]
        unreadable = [(place[image.id], image) for image in part.unreadable]
        if part.rows is None:
            yield [], None, unreadable
        else:
            for first in range(0, len(indices), chunk):
                rows = part.rows[first : first + chunk]
                yield indices[first : first + chunk], rows, unreadable if first == 0 else []


def line_of(prediction: Prediction, names: Sequence[str], top: int) -> dict[str, Any]:
    """Return the line of an image: its class, and the probabilities of the best classes.

    names: the names of all classes.
    top: the number of classes in the line.
    """
    probabilities, zero_shot = prediction.probabilities, prediction.zero_shot_probabilities
    if probabilities is None or zero_shot is None:
        return {"id": prediction.id, "status": prediction.status, "error": prediction.error}
    best = ranking(probabilities, top)
    return {
        "id": prediction.id,
        "status": prediction.status,
        "label": best[0],
        "name": names[best[0]],
        "probability": round(float(probabilities[best[0]]), 6),
        "zero_shot_name": names[ranking(zero_shot, 1)[0]],
        "best": [{"name": names[index], "probability": round(float(probabilities[index]), 6)} for index in best],
    }


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the predictions as CSV: the image, its class with the probability, and why an image has none."""
    text = io.StringIO()
    columns = ("id", "status", "label", "name", "probability", "zero_shot_name", "error")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode("utf-8", "backslashreplace").decode()
