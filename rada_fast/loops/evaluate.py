"""Evaluation on features: one record for each image, with the answers before and after adaptation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rada_fast.data.fingerprints import state_fingerprint
from rada_fast.data.sources import Source
from rada_fast.errors import UserError
from rada_fast.loops.kept_records import KeptRecords
from rada_fast.loops.setup import Setup
from rada_fast.models.class_features import TEXT_BATCH_SIZE, class_means
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.image_features import Features, features_of
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.summary import image_record, unreadable_records
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.progress import progress
from rada_fast.system import ranks

CHUNK_ELEMENTS = 2**24
"""The largest number of elements of one (B, K, D) tensor during an evaluation: 64 MiB in float32."""


@dataclass(frozen=True)
class EvaluationData:
    """Data to evaluate an adapter on, before their images are encoded.

    name: the name of the evaluation in the results.
    source: the images or their features.
    text: the text features T (K, D) of the classes, or None if the mean features of the images take their place.
    names: the names of the K classes.
    """

    name: str
    source: Source
    text: Tensor | None
    names: Sequence[str]


@dataclass(frozen=True)
class EvaluationSet:
    """Encoded images to evaluate an adapter on.

    name: the name of the evaluation in the results.
    images: the encoded images.
    text: the text features (K, D) of their classes, on the device, or a classifier of more classes.
    names: the names of the classes.
    rows: the rows of each class in a classifier, or None if the rows of text are the classes.
    """

    name: str
    images: Features
    text: Tensor
    names: Sequence[str]
    rows: Sequence[tuple[int, ...]] | None = None


def encode_evaluation(data: Sequence[EvaluationData], setup: Setup) -> list[EvaluationSet]:
    """Encode the images of evaluations. Raises UserError if an image has a label without a text feature."""
    sets, run = [], setup.options.run
    for one in data:
        title = f"encode {one.name} test images"
        images = features_of(one.source, setup.model, title=title, workers=run.workers, limit=run.limit)
        text = class_means(images, len(one.names)) if one.text is None else one.text
        if len(images.labels) and int(images.labels.max()) >= len(text):
            raise UserError(
                f"test images of {one.name} have label {int(images.labels.max())}, but there are {len(text)} classes"
            )
        sets.append(EvaluationSet(one.name, images, text.to(setup.device), one.names))
    return sets


def tuned_sets(
    sets: Sequence[EvaluationSet], data: Sequence[EvaluationData], setup: Setup, tuning: EncoderTuning | None
) -> Sequence[EvaluationSet]:
    """Encode the images and the classes of evaluations anew, with what is trained inside the encoders at present.

    sets: the evaluations as the encoders alone encode them; data: the same before they were encoded.
    tuning: what is trained inside the encoders. Without it, or where it does not change the images' features, those of
        the sets are returned.
    """
    if tuning is None:
        return sets
    found, run, vlm = [], setup.options.run, setup.model.loaded()
    with tuning.attached(), torch.no_grad():
        for one, before in zip(sets, data, strict=True):
            images, title = one.images, f"encode {one.name} test images again"
            if tuning.changes_images:
                trained = state_fingerprint(tuning.state_dict())
                images = features_of(
                    before.source, vlm, title=title, workers=run.workers, limit=run.limit, trained=trained
                )
            if images.ids != one.images.ids:
                raise UserError(f"test images of {one.name} have changed during the run: start it again")
            found.append(replace(one, images=images, text=_tuned_text(tuning, setup, one.names)))
    return found


def _tuned_text(tuning: EncoderTuning, setup: Setup, names: Sequence[str]) -> Tensor:
    """Return the text features (K, D) of classes, which the encoders compute with what is attached to them."""
    vlm = setup.model.loaded()
    parts = tuning.tokens_of(names).split(TEXT_BATCH_SIZE)
    return torch.cat([vlm.text_features_with_grad(part) for part in parts])


def trained_text(
    setup: Setup, source: Source, names: Sequence[str], text: Tensor, data: str
) -> tuple[Tensor, list[tuple[int, ...]] | None]:
    """Return what takes the place of the text features in the method of the set-up.

    source: the data.
    names: the names of their K classes.
    text: the text features (K, D) of these classes.
    data: the option that names the data, for messages.

    The second result is the rows of these classes, or None if the rows of the first result are the classes.
    """
    trained = setup.trained
    if trained is not None and trained.classifier is not None:
        prompts = setup.options.text.text_features is None
        if prompts and trained.stored.has_text_encoder and trained.find_rows(source, names) is None:
            return text, None  # the trained text encoder has computed the features of these classes
        return trained.classifier, trained.rows_of(source, names, data)
    if trained is not None and trained.tuning is not None:
        with trained.tuning.attached(), torch.no_grad():
            return _tuned_text(trained.tuning, setup, names), None
    return text, None


def image_tuning(setup: Setup, source: Source, data: str) -> EncoderTuning | None:
    """Return what the method of the set-up has trained inside the image encoder, or None if there is nothing.

    Raises UserError if the data, which the option of a message names, are features that the encoder cannot change.
    """
    trained = setup.trained
    if trained is None or trained.tuning is None or not trained.tuning.changes_images:
        return None
    if not source.holds_images:
        raise UserError(f"{data} must be images: {trained.stored.path} holds what was trained inside the image encoder")
    return trained.tuning


def trained_sets(
    sets: Sequence[EvaluationSet], data: Sequence[EvaluationData], setup: Setup
) -> Sequence[EvaluationSet]:
    """Return evaluations with what the method of the set-up has trained besides its head, for evaluate_sets.

    sets: the evaluations as the encoders alone encode them; data: the same before they were encoded.

    Raises UserError if the method does not fit the data.
    """
    trained = setup.trained
    if trained is None:
        return sets
    if trained.classifier is None:
        for before in data:
            image_tuning(setup, before.source, f"--data {before.name}")
        return tuned_sets(sets, data, setup, trained.tuning)
    found = []
    for one, before in zip(sets, data, strict=True):
        text, rows = trained_text(setup, before.source, one.names, one.text, f"--data {one.name}")
        found.append(replace(one, text=text, rows=rows))
    return found


def evaluate_sets(
    sets: Sequence[EvaluationSet], setup: Setup, folder: RunFolder, tuned: Sequence[EvaluationSet] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Evaluate the present head on every set. Returns the records of each set, by its name.

    folder: the folder of the run, which keeps the records until the run is finished.
    tuned: the same sets as tuned_sets or trained_sets returns them, for the answers after adaptation.
    """
    records = {}
    for one, after in zip(sets, sets if tuned is None else tuned, strict=True):

        def predict(images: Tensor, after: EvaluationSet = after) -> Tensor:
            logits: Tensor = setup.head(images, after.text, setup.logit_scale)
            return logits if after.rows is None else logits_of_rows(logits, after.rows)

        title = f"test {one.name}"
        records[one.name] = evaluate(
            predict, one.images, one.text, setup.logit_scale, names=one.names, title=title, device=setup.device,
            adapted_features=after.images.features,
            kept=KeptRecords(folder, {**setup.head.state_dict(), "text": after.text}), rows=after.rows,
        )  # fmt: skip
        if after.images.parts is not None:
            folder.when_stored(after.images.parts.remove)
    return records


def logits_of_rows(logits: Tensor, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the logits of classes that stand for rows of a classifier, of which the largest logit counts."""
    found = logits[:, [group[0] for group in rows]]
    for column, group in enumerate(rows):
        if len(group) > 1:
            found[:, column] = logits[:, list(group)].amax(dim=-1)
    return found


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    images: Features,
    text_features: Tensor,
    logit_scale: float,
    *,
    names: Sequence[str],
    title: str,
    device: torch.device,
    labels: Sequence[Sequence[int]] | None = None,
    adapted_features: Tensor | None = None,
    kept: KeptRecords | None = None,
    rows: Sequence[tuple[int, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate an adapter on encoded images. Returns a record of each image, those of unreadable images last.

    Several processes, which must all call this, share the images, and each has all records at the end.

    predict: a function that computes the adapted logits (B, K) of features (B, D).
    images: the encoded images.
    text_features: T (K, D), for the zero-shot answer.
    logit_scale: the multiplier s.
    names: the names of the K classes.
    title: the title of the progress bar.
    device: the device that computes.
    labels: the classes that each of the labels 0, 1, ... of the images stands for, if these are not the K classes
        themselves. Then only these classes are predicted. Where a label stands for several classes, each of them is
        right, and the records name the first.
    adapted_features: the features of the same images for the answer after adaptation, if they differ.
    kept: keeps the records as they come, and has those of an earlier run that was interrupted.
    rows: see EvaluationSet.
    """
    text_features = text_features.to(device)
    chunk = max(1, CHUNK_ELEMENTS // text_features.numel())
    classes = list(range(len(text_features))) if labels is None else [group[0] for group in labels]
    groups = [list(group) for group in labels or () if len(group) > 1]
    absent = torch.ones(len(text_features), dtype=torch.bool)
    absent[classes] = False
    records: list[dict[str, Any]] = []
    if kept is not None:
        tensors = {"features": images.features, "labels": images.labels, "text": text_features}
        tensors |= {} if adapted_features is None else {"adapted": adapted_features}
        records = kept.read(tensors, [logit_scale, names, labels, rows], images.ids)
        # Images are computed together with the same others as without an interruption.
        records = records[: len(records) // chunk * chunk if len(records) < len(images.ids) else None]
    group = ranks.current()
    records = group.broadcast(records)

    def records_of(first: int) -> list[dict[str, Any]]:
        part = images.features[first : first + chunk].to(device)
        changed = part if adapted_features is None else adapted_features[first : first + chunk].to(device)
        adapted = predict(changed).cpu().clone()  # it is changed below, and may be the caller's
        diverged = ~adapted.isfinite().all(dim=-1)
        zero_shot = zero_shot_logits(part, text_features, logit_scale).cpu()
        for logits in (adapted, zero_shot):
            for alike in groups:
                logits[:, alike[0]] = logits[:, alike].amax(dim=-1)
            logits[:, absent] = -torch.inf
        found = []
        for offset, (before, after) in enumerate(zip(zero_shot, adapted, strict=True)):
            label = classes[int(images.labels[first + offset])]
            status = "ok"
            if bool(diverged[offset]):
                # The zero-shot answer replaces adapted logits that are not finite, and the status says so.
                status, after = "diverged", before
            found.append(image_record(images.ids[first + offset], label, status, before, after, names))
        return found

    with progress(title, len(images.ids)) as advance:
        advance(len(records))
        while (done := len(records)) < len(images.ids):
            # Each process computes one of the coming chunks, and knows the records of all before the next ones.
            own = done + group.rank * chunk
            for found in group.all_gather(records_of(own) if own < len(images.ids) else []):
                records += found
            if kept is not None:
                kept.add(records[done:])
            advance(len(records) - done)
    unreadable = [(id, classes[label], reason) for id, label, reason in images.unreadable]
    return records + unreadable_records(unreadable, names)
