"""Test-time training (RAda, arXiv:2507.15480, Sec. 4.3): adapt to each image from its views alone, and predict it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from rada_fast.config.commands import TTTOptions
from rada_fast.config.inference import PredictOptions
from rada_fast.data.sources import Source
from rada_fast.data.views import image_seed
from rada_fast.engine.episodes import prediction_entropy
from rada_fast.engine.predictor import Prediction, TestTimePredictor
from rada_fast.engine.stages import StageTimes
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.zero_shot import check_sample
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.reports.answers import answers_of, counts_of
from rada_fast.reports.summary import (
    accuracy_of,
    already_finished,
    finish,
    image_record,
    is_image_record,
    label_entries,
)
from rada_fast.runs.changes import describe_change
from rada_fast.runs.contents import SUPERSEDED
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.machine import reset_peak_memory
from rada_fast.runs.profiling import profiled
from rada_fast.runs.progress import progress
from rada_fast.runs.shards import merge, own_file, shared_counts
from rada_fast.system import notices, ranks
from rada_fast.system.ranks import Ranks

IMAGES = "images.jsonl"


def run_ttt(options: TTTOptions) -> dict[str, Any]:
    """Adapt to every image of the data, predict it, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    group = ranks.current()
    setup = open_ttt(options)
    source = setup.sources["data"]
    # A line depends on its image alone, so only the lines of changed pictures are computed again. The rows of a feature
    # file have no times of change, so another file makes another run.
    deciding = [] if source.holds_images else ["data"]
    with open_folder(setup, {"data": source}, deciding=deciding, names=setup.names, text=setup.text) as folder:
        if group.first:
            drop_superseded(folder, source.known_labels())
        chosen = source.limited(options.run.limit)
        places = {id: place for place, id in enumerate(chosen.ids)}
        records = [record for record in folder.read_lines(IMAGES) if record.get("id") in places]
        done = set(group.broadcast([places[record["id"]] for record in records]))
        scope = {"images": len(places)}
        if len(done) == len(places) and (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=len(done))
        check_sample(chosen, f"--data {options.data}", setup)
        clock = adapt_to_all(setup, chosen, options, folder, records, done)
        if group.first:
            records = all_lines(folder, source)
        accuracy = group.from_first(
            lambda: accuracy_of(
                [record for record in records if record["id"] in places], before="zero_shot", after="adapted"
            )
        )
        results = {
            "classes": len(setup.names),
            "views": num_views(options, source),
            **accuracy,
            "unreadable": accuracy["status"]["unreadable"],
            "time": clock.report(),
        }
        return finish(folder, setup.facts(), results, scope=scope, resumed=len(done))


def open_ttt(options: TTTOptions) -> Setup:
    """Open the data, the model and the adapter. Raises UserError naming an option that cannot be used."""
    opened = open_data_and_model(options, {"data": options.data})
    source = opened.sources["data"]
    mention_fixed_views(options, source)
    names = class_names_of(source, options.text.classes, prompts=options.text.text_features is None)
    (text,) = text_features(options.text, [ClassGroup(names, data=options.data)], opened.model, opened.text_file)
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
    setup: Setup,
    source: Source,
    options: TTTOptions,
    folder: RunFolder,
    earlier: Sequence[Mapping[str, Any]],
    done: Collection[int],
) -> Clock:
    """Adapt to every image that no earlier run has recorded, and append a line for each as soon as it is done.

    Several ranks share the images. Each of them appends to a file of its own, and waits at the end for the others.

    setup: the set-up of the run.
    source: all images of the run.
    options: the options of the command.
    folder: the folder of the run.
    earlier: the records of the images that an earlier run has recorded. Only the first rank has them.
    done: the indices of these images.

    Returns the times of the run.
    """
    group = ranks.current()
    reset_peak_memory()
    clock, labels, own_lines = Clock(), source.known_labels(), own_file(IMAGES, group)
    order = visiting_order(len(source.ids), options.order_seed)
    chosen = group.share([index for index in order if index not in done])
    clock.images = len(chosen)
    with progress("test-time training", len(chosen), before=counts_of(earlier), gather=shared_counts(group)) as advance:
        with (
            profiled(options.run.profile, folder.path, "groups of images") as on_group,
            closing(predictions(setup, source, options, chosen, clock.stages, on_group)) as found,
        ):
            for prediction in found:
                with clock.stages.busy("record"):
                    record = record_of(prediction, labels[prediction.id], setup.names)
                    folder.append(own_lines, record)
                advance(answers=answers_of(record), readable=prediction.status != "unreadable")
        clock.add_others(group, lambda: advance(0))
    return clock


def all_lines(folder: RunFolder, source: Source) -> list[dict[str, Any]]:
    """Bring the lines of all ranks into images.jsonl, in the order of the data, and return their records.

    Whoever compares two runs finds the same lines in the same places, whatever order the images were done in.
    """
    merge(folder.path)
    places = {id: place for place, id in enumerate(source.ids)}
    records: dict[int, dict[str, Any]] = {}
    for record in folder.read_lines(IMAGES):
        records.setdefault(places[record["id"]], record)
    ordered = [records[place] for place in sorted(records)]
    folder.write_lines(IMAGES, ordered)
    return ordered


class Clock:
    """The time that a run has taken, as a whole and for each stage, and the number of its images."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages = StageTimes()
        self.images = 0
        self._others: list[dict[str, Any]] = []

    def add_others(self, group: Ranks, waiting: Callable[[], object]) -> None:
        """Wait until all ranks have come here, and count their images and the time of their stages.

        waiting: this is called again and again while some ranks have not come here yet.
        """
        own = {"images": self.images, "stages": self.stages.seconds()}
        found = group.all_gather(own, waiting)
        self._others = [one for rank, one in enumerate(found) if rank != group.rank]

    def report(self) -> dict[str, float | None]:
        """Return the number of images, the seconds in all and of each stage, and the images per second.

        Pictures are read and cut beside the other stages where there are workers, so the seconds of the stages may
        exceed those of the run. With several processes they are those of all processes together.
        """
        seconds = time.perf_counter() - self.start
        images = self.images + sum(one["images"] for one in self._others)
        stages = {
            f"{name}_seconds": round(value + sum(one["stages"][name] for one in self._others), 3)
            for name, value in self.stages.seconds().items()
        }
        speed = round(images / seconds, 3) if images else None
        processes = {"processes": 1 + len(self._others)} if self._others else {}
        return {"images": images, "seconds": round(seconds, 3), **stages, "images_per_second": speed, **processes}


def predictions(
    setup: Setup,
    source: Source,
    options: TTTOptions | PredictOptions,
    chosen: Sequence[int],
    times: StageTimes,
    on_group: Callable[[], None] | None = None,
) -> Generator[Prediction]:
    """Predict some images, and yield each as soon as it is predicted.

    setup: the set-up of the run.
    source: all images of the run.
    options: the options of the command.
    chosen: the indices of the images in the source, in the order in which they are begun.
    times: this counts the time of each stage.
    on_group: a function that is called after each group of images that are adapted together.
    """
    predictor = TestTimePredictor(
        setup.model, setup.names, text_features=setup.text, logit_scale=setup.logit_scale, adapter=setup.adapter,
        config=options.episode, views=options.views, view_kind=options.view_kind, seed=options.run.seed,
        workers=options.run.workers, memory=options.memory, episodes=options.episodes, times=times,
        on_group=on_group,
    )  # fmt: skip
    if (features := source.views()) is not None:
        return predictor.predict_features([(source.ids[index], features[index]) for index in chosen])
    return predictor.stream([(sample.id, sample.path) for sample in (source.samples[index] for index in chosen)])


def visiting_order(count: int, seed: int | None) -> list[int]:
    """Return the indices of the images in the order of adaptation: as stored, or shuffled with a seed."""
    if seed is None:
        return list(range(count))
    generator = torch.Generator().manual_seed(image_seed(seed, "order"))
    return torch.randperm(count, generator=generator).tolist()


def record_of(prediction: Prediction, label: int | None, names: Sequence[str]) -> dict[str, Any]:
    """Return the line of an image. label: the number of its class, or None if it is not known; names: all classes."""
    before, after = prediction.zero_shot_logits, prediction.logits
    if before is None or after is None:
        fate = {"status": prediction.status, "error": prediction.error}
        return {"id": prediction.id, **label_entries(label, names), **fate}
    entropies = [round(float(prediction_entropy(logits)), 6) for logits in (before, after)]
    return image_record(prediction.id, label, prediction.status, before, after, names) | {"entropy": entropies}
