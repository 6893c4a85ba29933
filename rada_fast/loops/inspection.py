"""The command inspect: what an adapter does with a set of images, as pictures, numbers and one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.inference import InspectOptions
from rada_fast.data.few_shot import take_in_turn
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import CHUNK_ELEMENTS, EvaluationSet, encode_evaluation, evaluate_sets, trained_sets
from rada_fast.loops.evaluation import IMAGES, open_sets
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup
from rada_fast.loops.zero_shot import check_answers
from rada_fast.modules import RationalAdapter
from rada_fast.reports.inspection import Inspection, Matrices, mask_statistics
from rada_fast.reports.inspection_page import page_of
from rada_fast.reports.inspection_pictures import write_pictures
from rada_fast.reports.projection import inner_products, project
from rada_fast.reports.results import evaluation_of
from rada_fast.reports.summary import accuracy_of, already_finished, finish
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.machine import reset_peak_memory
from rada_fast.runs.progress import progress
from rada_fast.system import notices
from rada_fast.system.terminal import finite

PAGE, NUMBERS = "inspect.html", "inspect.json"
MAX_ELEMENTS = 2**28
"""The largest number of elements of all masks that are kept at once: 1 GiB in float32."""
OF_CLASS = 10
"""So many images of a class are wanted in a plane."""


def run_inspect(options: InspectOptions) -> dict[str, Any]:
    """Evaluate what was trained on a set of images, and write the pictures, the numbers and the page.

    Returns the summary. Raises UserError naming an option that cannot be used.
    """
    setup, evaluation = open_sets("inspect", options, (options.data,))
    if not isinstance(setup.head, RationalAdapter):
        raise UserError(f"adapter {options.adapter.adapter} has no rational adapter, so there is no mask to inspect")
    with open_folder(setup, setup.sources, deciding=(), names=setup.names, text=setup.text) as folder:
        scope = {"limit": options.run.limit}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=1)
        reset_peak_memory()
        start = time.perf_counter()
        (before,) = encode_evaluation(evaluation, setup)
        if not before.images.ids:
            raise UserError(f"--data {options.data} has no image that can be read")
        check_answers(before.images, before.text, before.names, f"--data {options.data}", setup)
        folder.accept_inputs()
        (after,) = trained_sets([before], evaluation, setup)
        (records,) = evaluate_sets([before], setup, folder, [after]).values()
        folder.write_lines(IMAGES, [{"data": options.data} | record for record in records])
        inspection = inspection_of(setup, options, before, after, records)
        facts = {
            "data": options.data,
            "adapter": options.adapter.adapter or "none: a new one, which changes nothing",
            "model": " ".join(filter(None, (options.model.model, setup.options.model.pretrained))),
            "classes": len(setup.names),
        }
        write_inspection(folder, inspection, facts)
        mask = mask_statistics(inspection.matrices.mask)
        results = {
            options.data: {"classes": len(setup.names)} | accuracy_of(records, before="zero_shot", after="adapted"),
            "mask": {name: mask[name] for name in ("images", "mean", "std", "min", "max")},
            "projection": inspection.projections[0].method,
            "page": str(folder.path / PAGE),
            "unreadable": sum(record["status"] == "unreadable" for record in records),
            "time": {"seconds": round(time.perf_counter() - start, 3)},
        }
        return finish(folder, setup.facts(), results, scope=scope, resumed=0)


def inspection_of(
    setup: Setup,
    options: InspectOptions,
    before: EvaluationSet,
    after: EvaluationSet,
    records: Sequence[dict[str, Any]],
) -> Inspection:
    """Compute everything that the pictures show.

    before, after: the images and the classes before anything was trained, and as the trained method encodes them.
    records: the records of all images.
    """
    chosen = shown_first(records, options.show, before.images.ids)
    room = max(1, MAX_ELEMENTS // after.text.numel())
    count = min(options.images, len(before.images.ids))
    if room < count:
        notices.warn(
            f"--images {options.images}: masks of {after.text.shape[0]} classes of width {after.text.shape[1]} leave "
            f"room for those of {room} images, and so many are drawn"
        )
    chosen = chosen[:room]
    labels = before.images.labels.tolist()
    others = [place for place in range(len(labels)) if place not in chosen]
    more = drawn_images([labels[place] for place in others], max(0, min(count, room) - len(chosen)))
    places = sorted(chosen + [others[index] for index in more])
    matrices = matrices_of(setup, before, after, places)
    with progress("project matrices", 2) as advance:
        projections = []
        for products in (inner_products(*matrices.rational), inner_products(*matrices.adapted, matrices.mask)):
            projections.append(project(products, matrices.labels, perplexity=options.perplexity, seed=options.run.seed))
            advance(1)
    evaluation = evaluation_of(
        records, folder=Path(options.run.output), command="inspect", method="", options={},
        seed=options.run.seed, trained_on=None, data=options.data, part="all",
    )  # fmt: skip
    shown = tuple(places.index(place) for place in chosen)
    return Inspection(
        evaluation, matrices, setup.logit_scale, (projections[0], projections[1]), shown, tuple(before.names)
    )


def drawn_images(labels: Sequence[int], count: int) -> list[int]:
    """Return the indices of at most `count` images, spread over the classes.

    Where all classes would have fewer than OF_CLASS images each, so many classes, at even distances, are preferred that
    each of them can have so many: a class of one image shows nothing in a plane.
    """
    present = sorted(set(labels))
    most = min(len(present), max(1, count // OF_CLASS))
    preferred = {present[place * len(present) // most] for place in range(most)}
    found: list[int] = []
    for first in (True, False):
        own = [place for place, label in enumerate(labels) if (label in preferred) == first]
        found += [own[index] for index in take_in_turn([labels[place] for place in own], count - len(found))]
    return sorted(found)


def matrices_of(setup: Setup, before: EvaluationSet, after: EvaluationSet, places: Sequence[int]) -> Matrices:
    """Compute the masks of some images. places: their indices among all images."""
    chosen = torch.tensor(places, dtype=torch.int64)
    images = after.images.features[chosen]
    # A class of several rows of a classifier is shown by the first of them.
    rows = list(range(len(after.text))) if after.rows is None else [group[0] for group in after.rows]
    step = max(1, CHUNK_ELEMENTS // after.text.numel())
    mask = torch.empty(len(places), len(rows), images.shape[1])
    with progress("compute masks", len(places)) as advance, torch.no_grad():
        for first in range(0, len(places), step):
            part = images[first : first + step].to(setup.device)
            found = setup.adapter.mask(part, after.text.to(setup.device), setup.logit_scale)
            mask[first : first + step] = found[:, rows].cpu()
            advance(len(part))
    if not bool(mask.isfinite().all()):
        raise UserError(f"adapter {setup.options.adapter.adapter} gives masks that are not finite")
    ids = tuple(before.images.ids[place] for place in places)

    def on_cpu(features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return features[chosen].float().cpu(), text.float().cpu()

    return Matrices(
        ids,
        before.images.labels[chosen],
        on_cpu(before.images.features, before.text),
        on_cpu(after.images.features, after.text[rows]),
        mask,
    )


def shown_first(records: Sequence[Mapping[str, Any]], show: Sequence[str], ids: Sequence[str]) -> list[int]:
    """Return the indices of the images whose heat maps are drawn.

    Without names of images these are one that adaptation puts right, one that it puts wrong and one that is right both
    times, as far as there are such images; of each kind it is the one whose confidence changes most.

    show: the names that the option --show gives; ids: the names of all images that could be read.

    Raises UserError naming an image that is not there.
    """
    place = {id: index for index, id in enumerate(ids)}
    if missing := [name for name in show if name not in place]:
        raise UserError(f"show must name images of the data that can be read, such as {ids[0]}, got {missing[0]!r}")
    if show:
        return [place[name] for name in dict.fromkeys(show)]
    kinds: dict[tuple[bool, bool], tuple[float, str]] = {}
    for record in records:
        if record["status"] == "unreadable":
            continue
        kind = (record["zero_shot"][0] == record["label"], record["adapted"][0] == record["label"])
        change = abs(record["confidence"][1] - record["confidence"][0])
        if kind not in kinds or change > kinds[kind][0]:
            kinds[kind] = (change, record["id"])
    order = [(False, True), (True, False), (True, True), (False, False)]
    return [place[kinds[kind][1]] for kind in order if kind in kinds][:3]


def write_inspection(folder: RunFolder, inspection: Inspection, facts: Mapping[str, Any]) -> None:
    """Write the pictures, the page and the numbers of an inspection into the folder of its run."""
    pictures: dict[str, bytes] = {}

    def write(name: str, draw: Callable[[Path], object]) -> None:
        folder.write_by(name, draw)
        pictures[name] = (folder.path / name).read_bytes()

    write_pictures(inspection, write)
    folder.write_json(NUMBERS, finite(inspection.numbers()))
    folder.write_table(PAGE, page_of(inspection, pictures, facts))
