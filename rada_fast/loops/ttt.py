"""Test-time training (RAda, arXiv:2507.15480, Sec. 4.3): adapt to each image from its views alone, predict, forget."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.commands import TTTOptions
from rada_fast.data.sources import Source
from rada_fast.data.views import image_seed
from rada_fast.engine.episodes import adapt_episodes, prediction_entropy
from rada_fast.loops.features import iterate_views
from rada_fast.loops.setup import Problem, open_setup, open_sources
from rada_fast.ops import zero_shot_logits
from rada_fast.reports.summary import accuracy_of, already_finished, finish, image_record, is_image_record
from rada_fast.runs.folder import SUPERSEDED, RunFolder, describe_change, reset_peak_memory
from rada_fast.runs.identity import open_folder
from rada_fast.runs.progress import progress
from rada_fast.system import notices

IMAGES = "images.jsonl"


@dataclass(frozen=True)
class Episode:
    """One image on its way through: its views' features, or the reason why it could not be read."""

    id: str
    label: int | None
    views: Tensor | None  # (V, D), unit norm
    error: str | None = None


def run_ttt(config: TTTOptions) -> dict[str, Any]:
    """Adapt to and predict every image of the data; returns the summary that it also writes.

    Raises UserError naming the option that cannot be used.
    """
    setup = open_setup(config, open_sources({"data": config.data}))
    source = setup.sources["data"]
    mention_fixed_views(config, source)
    names = setup.class_names(source)
    problem = setup.problem(names, setup.text_features(names, training=None))
    problem.check_width(source.width, f"--data {config.data}")
    # A line is of its image alone: one whose picture has changed is made anew, and all others stay. A feature file's
    # rows have no times of their own, so another file is another run.
    deciding = [] if source.holds_images else ["data"]
    with open_folder("ttt", problem, {"data": source}, deciding=deciding, names=names, text=problem.text) as folder:
        drop_superseded(folder, source.known_labels())
        ids = frozenset(source.limited(config.run.limit).ids)
        records = [record for record in folder.read_lines(IMAGES) if record.get("id") in ids]
        done = {record["id"] for record in records}
        covers = {"images": len(ids)}
        if len(done) == len(ids) and (summary := folder.finished(covers)) is not None:
            return already_finished(folder, summary, resumed=len(done))
        clock = Clock()
        total = adapt_to_all(config, problem, folder, done, clock)
        records = [record for record in folder.read_lines(IMAGES) if record.get("id") in ids]
        accuracy = accuracy_of(records, before="zero_shot", after="adapted")
        results = {
            "classes": len(names),
            "views": views_of(config, source),
            **accuracy,
            "unreadable": accuracy["status"]["unreadable"],
            "time": clock.report(total),
        }
        return finish(folder, "ttt", problem, results, covers=covers, resumed=len(done))


def views_of(config: TTTOptions, source: Source) -> int:
    """How many views of an image the run has: those that a feature file holds, otherwise as many as are asked for."""
    return config.views if source.num_views is None else source.num_views


def mention_fixed_views(config: TTTOptions, source: Source) -> None:
    """Say where the views of a feature file are not those that were asked for."""
    views = views_of(config, source)
    held = f"makes no views of a feature file: {config.data} holds {views} of each image"
    if views != config.views and config.views == TTTOptions.views:
        notices.note(f"--views {held}")
    elif views != config.views:
        notices.warn(f"--views {config.views} {held}")
    if source.num_views is not None and config.view_kind != TTTOptions.view_kind:
        notices.warn(f"--view-kind {config.view_kind} makes no views of a feature file: {config.data} holds its own")


def drop_superseded(folder: RunFolder, labels: Mapping[str, int | None]) -> None:
    """Take out of images.jsonl what is no image's line as it is now: each has one, of its picture and its label.

    labels: those of all images, by id.
    """
    before, now = folder.before.get("data", {}), folder.inputs.parts["data"]
    by_image = "data" not in folder.inputs.deciding  # otherwise a run with other data has been refused
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


def adapt_to_all(config: TTTOptions, problem: Problem, folder: RunFolder, done: set[str], clock: Clock) -> int:
    """Adapt to and record every image that is not done yet; returns how many those were."""
    reset_peak_memory()
    pending: list[Episode] = []
    total, stream = episodes_of(config, problem, done, clock)
    with progress("test-time training", total) as advance:
        for episode in stream:
            pending.append(episode)
            if len(pending) == config.episodes:
                adapt_and_record(pending, folder, problem, config, clock)
                advance(len(pending))
                pending.clear()
        adapt_and_record(pending, folder, problem, config, clock)
        advance(len(pending))
    return total


class Clock:
    """Seconds spent by part of the work, and as a whole."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts = {"encode": 0.0, "adapt": 0.0}

    def report(self, images: int) -> dict[str, float | None]:
        """Of the images done since the start: how many, seconds in all and by part, and images per second.

        Reading and view making are what the parts leave over.
        """
        seconds = time.perf_counter() - self.start
        parts = {f"{name}_seconds": round(value, 3) for name, value in self.parts.items()}
        speed = round(images / seconds, 3) if images else None
        return {"images": images, "seconds": round(seconds, 3), **parts, "images_per_second": speed}


def episodes_of(config: TTTOptions, problem: Problem, done: set[str], clock: Clock) -> tuple[int, Iterator[Episode]]:
    """How many images are left, and their episodes, in the order asked for."""
    source = problem.sources["data"].limited(config.run.limit)
    ids, labels = source.ids, source.known_labels()
    chosen = [i for i in visiting_order(len(ids), config) if ids[i] not in done]
    if (features := source.views()) is not None:
        return len(chosen), (Episode(ids[i], labels[ids[i]], features[i]) for i in chosen)
    samples = [source.samples[i] for i in chosen]
    vlm = problem.model

    def encoded() -> Iterator[Episode]:
        stream = iterate_views(
            samples, vlm, views=config.views, kind=config.view_kind, seed=config.run.seed, workers=config.run.workers
        )
        for index, views, reason in stream:
            sample = samples[index]
            label = labels[sample.id]
            if views is None:
                yield Episode(sample.id, label, None, reason)
                continue
            start = time.perf_counter()
            # One image a call: the shapes, and with them the bits, depend on nothing but the image.
            features = vlm.encode_images(views, [sample.id])
            clock.parts["encode"] += time.perf_counter() - start
            yield Episode(sample.id, label, features)

    return len(samples), encoded()


def visiting_order(count: int, config: TTTOptions) -> list[int]:
    """Indices in the order in which images are visited."""
    if config.order_seed is None:
        return list(range(count))
    generator = torch.Generator().manual_seed(image_seed(config.order_seed, "order"))
    return torch.randperm(count, generator=generator).tolist()


def adapt_and_record(
    episodes: list[Episode],
    folder: RunFolder,
    problem: Problem,
    config: TTTOptions,
    clock: Clock,
) -> None:
    """Adapt to a group of episodes and append one line for each."""
    readable = [episode for episode in episodes if episode.views is not None]
    for episode in episodes:
        if episode.views is None:
            record = {"id": episode.id, "label": episode.label, "status": "unreadable", "error": episode.error}
            folder.append(IMAGES, record)
    if not readable:
        return
    start = time.perf_counter()
    text, scale = problem.text, problem.logit_scale
    views = torch.stack([episode.views for episode in readable if episode.views is not None])  # (E, V, D)
    views = views.to(problem.device)
    adapted = adapt_episodes(problem.adapter, views, text, scale, config.episode).cpu()  # (E, K)
    # Each original by itself, as its episode was, so that its bits do not depend on the group.
    zero_shot = torch.cat([zero_shot_logits(view[:1], text, scale) for view in views]).cpu()  # (E, K)
    clock.parts["adapt"] += time.perf_counter() - start
    entropies = zip(prediction_entropy(zero_shot).tolist(), prediction_entropy(adapted).tolist(), strict=True)
    for episode, before, after, (entropy_before, entropy_after) in zip(
        readable, zero_shot, adapted, entropies, strict=True
    ):
        status = "ok"
        if not bool(torch.isfinite(after).all()):
            # A diverged episode keeps the answer it started from, and says so.
            status, after, entropy_after = "diverged", before, entropy_before
        record = image_record(episode.id, episode.label, status, before, after)
        folder.append(IMAGES, record | {"entropy": [round(entropy_before, 6), round(entropy_after, 6)]})
