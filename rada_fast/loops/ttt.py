"""Test-time training (RAda, arXiv:2507.15480, Sec. 4.3): adapt to each image from its views alone, and predict it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.commands import TTTOptions
from rada_fast.config.method import EpisodeConfig
from rada_fast.data.sources import Source
from rada_fast.data.views import image_seed
from rada_fast.engine.episodes import adapt_episodes, prediction_entropy
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import iterate_views
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.summary import accuracy_of, already_finished, finish, image_record, is_image_record
from rada_fast.runs.folder import SUPERSEDED, RunFolder, describe_change, reset_peak_memory
from rada_fast.runs.progress import progress
from rada_fast.system import notices

IMAGES = "images.jsonl"


@dataclass(frozen=True)
class Episode:
    """One image that is to be adapted to.

    id: the name of the image.
    label: the number of its class, or None if it is not known.
    views: the unit-norm features (V, D) of its views, or None if the image could not be read.
    error: the reason why it could not be read.
    """

    id: str
    label: int | None
    views: Tensor | None
    error: str | None = None


def run_ttt(options: TTTOptions) -> dict[str, Any]:
    """Adapt to every image of the data, predict it, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    setup = open_ttt(options)
    source = setup.sources["data"]
    # A line depends on its image alone, so only the lines of changed pictures are computed again. The rows of a feature
    # file have no times of change, so another file makes another run.
    deciding = [] if source.holds_images else ["data"]
    with open_folder(setup, {"data": source}, deciding=deciding, names=setup.names, text=setup.text) as folder:
        drop_superseded(folder, source.known_labels())
        chosen = source.limited(options.run.limit)
        ids = frozenset(chosen.ids)
        records = [record for record in folder.read_lines(IMAGES) if record.get("id") in ids]
        done = {record["id"] for record in records}
        scope = {"images": len(ids)}
        if len(done) == len(ids) and (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=len(done))
        clock = Clock()
        total = adapt_to_all(setup, chosen, options, folder, done, clock)
        records = [record for record in folder.read_lines(IMAGES) if record.get("id") in ids]
        accuracy = accuracy_of(records, before="zero_shot", after="adapted")
        results = {
            "classes": len(setup.names),
            "views": num_views(options, source),
            **accuracy,
            "unreadable": accuracy["status"]["unreadable"],
            "time": clock.report(total),
        }
        return finish(folder, setup.facts(), results, scope=scope, resumed=len(done))


def open_ttt(options: TTTOptions) -> Setup:
    """Open the data, the model and the adapter. Raises UserError naming an option that cannot be used."""
    opened = open_data_and_model(options, {"data": options.data})
    source = opened.sources["data"]
    mention_fixed_views(options, source)
    names = class_names_of(source, options.text.classes, prompts=options.text.text_features is None)
    (text,) = text_features(options.text, [ClassGroup(names)], opened.model, opened.text_file)
    return open_setup("ttt", options, opened, names, text)


def num_views(options: TTTOptions, source: Source) -> int:
    """Return the number of views of an image: those that a feature file stores, or those that the option asks for."""
    return options.views if source.num_views is None else source.num_views


def mention_fixed_views(options: TTTOptions, source: Source) -> None:
    """Tell the user if a feature file has other views than the options ask for."""
    views = num_views(options, source)
    fixed = f"makes no views of a feature file: {options.data} holds {views} of each image"
    if views != options.views and options.views == TTTOptions.views:
        notices.note(f"--views {fixed}")
    elif views != options.views:
        notices.warn(f"--views {options.views} {fixed}")
    if source.num_views is not None and options.view_kind != TTTOptions.view_kind:
        notices.warn(f"--view-kind {options.view_kind} makes no views of a feature file: {options.data} holds its own")


def drop_superseded(folder: RunFolder, labels: Mapping[str, int | None]) -> None:
    """Move lines out of images.jsonl that are damaged, repeated, or about images that were changed or removed.

    labels: the present labels of all images, by id.
    """
    before, now = folder.stored_inputs.get("data", {}), folder.inputs.parts["data"]
    by_image = "data" not in folder.inputs.deciding  # otherwise other data make another run
    kept: dict[str, dict[str, Any]] = {}
    old = []
    for record in folder.read_lines(IMAGES):
        id = str(record.get("id"))
        unchanged = id in labels and (not by_image or before.get(id) == now[id])
        if unchanged and id not in kept and is_image_record(record, labels[id]):
            kept[id] = record
        else:
            old.append(record)
    if old:
        change = describe_change(before, now) if by_image else ""
        what = f"of images that have changed or gone ({change})" if change else "damaged, or there twice"
        notices.note(f"{len(old)} lines are {what}; they were moved to {folder.path / SUPERSEDED}")
    folder.supersede(IMAGES, list(kept.values()), old)
    folder.accept_inputs()


def adapt_to_all(
    setup: Setup, source: Source, options: TTTOptions, folder: RunFolder, done: set[str], clock: Clock
) -> int:
    """Adapt to every image that no earlier run has recorded. Returns the number of these images.

    setup: the set-up of the run.
    source: all images of the run.
    options: the options of the command.
    folder: the folder of the run.
    done: the ids of the images that an earlier run has recorded.
    clock: this measures the time of each part of the work.
    """
    reset_peak_memory()
    pending: list[Episode] = []
    order = visiting_order(len(source.ids), options.order_seed)
    chosen = [index for index in order if source.ids[index] not in done]
    with progress("test-time training", len(chosen)) as advance:
        for episode in episodes_of(setup, source, options, chosen, clock):
            pending.append(episode)
            if len(pending) == options.episodes:
                adapt_and_record(pending, setup, options.episode, folder, clock)
                advance(len(pending))
                pending.clear()
        adapt_and_record(pending, setup, options.episode, folder, clock)
        advance(len(pending))
    return len(chosen)


class Clock:
    """The time that a run has taken, as a whole and for each part of the work."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts = {"encode": 0.0, "adapt": 0.0}

    def report(self, images: int) -> dict[str, float | None]:
        """Return the number of images, the seconds in all and of each part, and the images per second.

        The rest of the seconds was spent on reading images and making views.
        """
        seconds = time.perf_counter() - self.start
        parts = {f"{name}_seconds": round(value, 3) for name, value in self.parts.items()}
        speed = round(images / seconds, 3) if images else None
        return {"images": images, "seconds": round(seconds, 3), **parts, "images_per_second": speed}


def episodes_of(
    setup: Setup, source: Source, options: TTTOptions, chosen: Sequence[int], clock: Clock
) -> Iterator[Episode]:
    """Yield the episodes of some images.

    setup: the set-up of the run.
    source: all images of the run.
    options: the options of the command.
    chosen: the indices of the images in the source, in the order of the episodes.
    clock: this measures the time of encoding.
    """
    labels = source.known_labels()
    if (features := source.views()) is not None:
        for index in chosen:
            yield Episode(source.ids[index], labels[source.ids[index]], features[index])
        return
    model, run = setup.model.loaded(), options.run
    samples = [source.samples[index] for index in chosen]
    stream = iterate_views(
        samples, model, views=options.views, kind=options.view_kind, seed=run.seed, workers=run.workers
    )
    for index, views, reason in stream:
        id = samples[index].id
        if views is None:
            yield Episode(id, labels[id], None, reason)
            continue
        start = time.perf_counter()
        # Each image is encoded by itself, so that the shapes, and with them the last bits, depend on the image alone.
        encoded = model.encode_images(views, [id])
        clock.parts["encode"] += time.perf_counter() - start
        yield Episode(id, labels[id], encoded)


def visiting_order(count: int, seed: int | None) -> list[int]:
    """Return the indices of the images in the order of adaptation: as stored, or shuffled with a seed."""
    if seed is None:
        return list(range(count))
    generator = torch.Generator().manual_seed(image_seed(seed, "order"))
    return torch.randperm(count, generator=generator).tolist()


def adapt_and_record(
    episodes: list[Episode], setup: Setup, config: EpisodeConfig, folder: RunFolder, clock: Clock
) -> None:
    """Adapt to a group of images, and append a line for each to images.jsonl.

    episodes: the images with the features of their views.
    setup: the set-up of the run.
    config: the configuration of the adaptation.
    folder: the folder of the run.
    clock: this measures the time of adaptation.
    """
    readable = [episode for episode in episodes if episode.views is not None]
    for episode in episodes:
        if episode.views is None:
            record = {"id": episode.id, "label": episode.label, "status": "unreadable", "error": episode.error}
            folder.append(IMAGES, record)
    if not readable:
        return
    start = time.perf_counter()
    text, scale = setup.text, setup.logit_scale
    views = torch.stack([episode.views for episode in readable if episode.views is not None])  # (E, V, D)
    views = views.to(setup.device)
    adapted = adapt_episodes(setup.adapter, views, text, scale, config).cpu()  # (E, K)
    # Each original view is predicted by itself, like its episode, so that its bits do not depend on the group.
    zero_shot = torch.cat([zero_shot_logits(view[:1], text, scale) for view in views]).cpu()  # (E, K)
    clock.parts["adapt"] += time.perf_counter() - start
    entropies = zip(prediction_entropy(zero_shot).tolist(), prediction_entropy(adapted).tolist(), strict=True)
    for episode, before, after, (entropy_before, entropy_after) in zip(
        readable, zero_shot, adapted, entropies, strict=True
    ):
        status = "ok"
        if not bool(torch.isfinite(after).all()):
            # The zero-shot answer replaces adapted logits that are not finite, and the status says so.
            status, after, entropy_after = "diverged", before, entropy_before
        record = image_record(episode.id, episode.label, status, before, after)
        folder.append(IMAGES, record | {"entropy": [round(entropy_before, 6), round(entropy_after, 6)]})
