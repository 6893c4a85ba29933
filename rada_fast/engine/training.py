"""Train for epochs: the batches of an epoch, the learning rates, the steps, and a record of each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rada_fast.config.commands import Schedule
from rada_fast.data.sources import Sample
from rada_fast.data.views import image_seed
from rada_fast.engine.sharing import counts_of, own_part, part_of
from rada_fast.engine.steps import TrainingStep
from rada_fast.errors import UserError
from rada_fast.models.image_features import (
    ENCODER_BATCH,
    Rows,
    Unreadable,
    check_some_readable,
    iterate_features,
    iterate_images,
    iterate_views,
)
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.system import termination
from rada_fast.system.ranks import Ranks

WARMUP_LR = 1e-5
"""The learning rate of the one warm-up epoch in the published configurations of efficient fine-tuning."""
TRAIN_CROP_SCALE = (0.9, 1.0)
"""The smallest and the largest share of the picture in a training crop, as in the training defaults of open_clip."""

ROWS_ORDERED = 1024
"""About so many rows of features are put into the order of an epoch at once."""


class Batch(NamedTuple):
    """The inputs of a step, and the place of its images in the order of the epoch.

    inputs: features (B, D) or images (B, 3, S, S).
    labels: their labels (B,).
    ids: the names of the images, if they were read from files.
    start, until: the step covers the places [start, until) of the epoch's order. This is more than B places if some of
        the images cannot be read. The places between two batches are those of batches that were left out.
    counts: how many of the images each process has, if several share the batch. All other fields but the places are
        then those of this process's images.
    """

    inputs: Tensor
    labels: Tensor
    ids: Sequence[str] = ()
    start: int = 0
    until: int = 0
    counts: Sequence[int] = ()


def efficient_rate(lr: float, schedule: Schedule, epochs: int) -> Callable[[int, int], float]:
    """Return the learning rate of efficient fine-tuning as a function of the epoch and the step.

    "cosine" has one warm-up epoch with WARMUP_LR, and then falls from epoch to epoch to zero as a cosine.
    """

    def rate(epoch: int, step: int) -> float:
        if schedule == "constant" or epochs == 1:
            return lr
        return warm_up_then_cosine(lr, epoch, epochs, warmup=0) if epoch else min(WARMUP_LR, lr)

    return rate


def warm_up_then_cosine(lr: float, step: int, total: int, warmup: int) -> float:
    """Return the learning rate of a step: it rises linearly to lr during warmup steps, then falls to zero as a cosine.

    lr: the largest rate.
    step: the number of the step, counted from 0.
    total: the number of steps in all.
    warmup: the number of steps in which the rate rises.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def shuffled(count: int, seed: int, name: str) -> Tensor:
    """Return the order (count,) of the images in an epoch, which depends on the seed and the name alone.

    count: the number of images.
    seed, name: the seed of the run, and the name of the epoch.
    """
    generator = torch.Generator().manual_seed(image_seed(seed, name))
    return torch.randperm(count, generator=generator)


def feature_batches(
    features: Tensor,
    labels: Tensor,
    order: Tensor,
    batch_size: int,
    device: torch.device,
    group: Ranks | None = None,
    *,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of an epoch on features (N, D) with labels (N,), in an order (N,).

    group: the processes that share each batch; by default this one has all of it.
    first: the place in the order at which the first of these batches starts.

    Everything is copied to the device once, so no step of the epoch waits for a copy. Rows are put into their order for
    many batches at once, because a step at B 1 is short.
    """
    count = len(order)
    if first >= count:
        return
    features, labels, order, start = features.to(device), labels.to(device), order[first:].to(device), first
    for indices in order.split(max(1, ROWS_ORDERED // batch_size) * batch_size):
        rows, targets = features.index_select(0, indices), labels.index_select(0, indices)
        for inputs, own in zip(rows.split(batch_size), targets.split(batch_size), strict=True):
            end = min(start + batch_size, count)
            if group is None or not group.several:
                yield Batch(inputs, own, (), start, end)
            else:
                part = part_of(end - start, group)
                yield Batch(inputs[part], own[part], (), start, end, counts_of(end - start, group))
            start = end


@dataclass
class ImageBatches:
    """Read the batches of an epoch from image files, with one loader that reads ahead.

    samples: the image files.
    vlm: the model, which determines the form of the images.
    batch_size: the number of images in a step.
    seed: the seed of the run.
    crops: whether each epoch makes new random crops, whose draws depend on the seed, the epoch and the image alone.
    encoded: whether the batches hold features, which the model computes in batches of its own size, or the images.
    workers: see iterate_views.
    note_unreadable: a function that takes images that could not be read, as soon as they are found.
    group: the processes that share each batch. Each of them reads its own images alone.
    """

    samples: Sequence[Sample]
    vlm: VisionLanguageModel
    batch_size: int
    seed: int
    crops: bool
    encoded: bool
    workers: int
    note_unreadable: Callable[[Iterable[Unreadable]], object]
    group: Ranks = field(default_factory=Ranks)

    def epoch(self, name: str, views_name: str, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch. A batch lacks the images that cannot be read; an empty batch is left out.

        name, views_name: the names that decide the order of the images and, with their ids, the crops.
        first: the place in the order at which the first of these batches starts. No image before it is read, but the up
            to ENCODER_BATCH - 1 images that the encoder computes together with it.

        Raises UserError if no image can be read, or if the features of an image are not usable.
        """
        places, before = self._places(name, first)
        own = [index for _, _, indices in places for index in indices]
        # The encoder gets the same images at once as without an interruption, so that sums are rounded alike.
        skipped = before // ENCODER_BATCH * ENCODER_BATCH if self.encoded else before
        samples = [self.samples[index] for index in own[skipped:]]
        stream = iterate_views(
            samples,
            self.vlm,
            views=0 if self.crops else 1,
            kind="crop",
            seed=image_seed(self.seed, views_name),
            workers=self.workers,
            crop_scale=TRAIN_CROP_SCALE,
            ahead=self.batch_size,
        )
        parts = iterate_images(stream, samples)
        if self.encoded:
            parts = iterate_features(stream, samples, self.vlm, batch=ENCODER_BATCH)
        unreadable: list[Unreadable] = []
        waiting, indices = [self._no_rows()], list[int]()
        batches, ends = [place for place in places if place[0] >= first], 0
        end = before - skipped
        # The last part has no images. It ends the batches of which this process has none.
        for part in chain(parts, [Rows(None, [], len(samples))]):
            if part.unreadable:
                unreadable += part.unreadable
                self.note_unreadable(part.unreadable)
            # The first part begins with what was in steps before an interruption.
            new = [row for row, index in enumerate(part.indices) if index >= before - skipped]
            indices += [part.indices[row] for row in new]
            if part.rows is not None and new:
                waiting.append(part.rows[new[0] :])
            while ends < len(batches) and part.until >= end + len(batches[ends][2]):
                start, until, of_batch = batches[ends]
                end, ends = end + len(of_batch), ends + 1
                count = sum(index < end for index in indices)
                counts = self._counts(count)
                if sum(counts):
                    rows, step = torch.cat(waiting), [samples[index] for index in indices[:count]]
                    labels = torch.tensor([sample.label for sample in step], dtype=torch.int64)
                    ids = [sample.id for sample in step]
                    yield Batch(rows[:count], labels, ids, start, until, counts if self.group.several else ())
                    waiting, indices = [rows[count:]], indices[count:]
        if first == 0:
            found = [Unreadable(*image) for images in self.group.all_gather(unreadable) for image in images]
            check_some_readable(found, self.samples)

    def _places(self, name: str, first: int) -> tuple[list[tuple[int, int, list[int]]], int]:
        """Return where each batch starts and ends in the order of an epoch, and the images that this process has of it.

        The second result is how many images this process has in the batches before a place.
        """
        order, size, places = shuffled(len(self.samples), self.seed, name).tolist(), self.batch_size, []
        for start in range(0, len(order), size):
            until = min(start + size, len(order))
            places.append((start, until, order[start:until][part_of(until - start, self.group)]))
        return places, sum(len(indices) for start, _, indices in places if start < first)

    def _counts(self, own: int) -> list[int]:
        """Return how many images of a batch each process could read. own: how many this one could."""
        counts = torch.zeros(self.group.count, dtype=torch.int64)
        counts[self.group.rank] = own
        self.group.all_reduce([counts])
        return [int(count) for count in counts]

    def _no_rows(self) -> Tensor:
        """Return the inputs of a batch without images."""
        if self.encoded:
            return torch.empty(0, self.vlm.embed_dim, device=self.vlm.device)
        return torch.empty(0, 3, self.vlm.preprocess.image_size, self.vlm.preprocess.image_size)


@contextmanager
def drawing_from(
    seed: int,
    name: str,
    device: torch.device,
    states: Mapping[str, Tensor] | None = None,
    group: Ranks | None = None,
) -> Iterator[None]:
    """Seed the random numbers that PyTorch draws itself, such as those of dropout, while the context lasts.

    They depend on the seed, the name and the process alone, so a run that was interrupted and goes on draws the same
    numbers as one that was not. The processes of a group have different images, and draw different numbers.

    states: what random_states returned in the middle of such a context, to go on from there. A process that was not in
        the group at that time starts with numbers of its own.
    group: the processes that share the batches; by default this one has them alone.
    """
    rank = 0 if group is None else group.rank
    if rank:
        name = f"{name} of rank {rank}"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        context_seed = image_seed(seed, f"{name} draws")
        # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
        torch.default_generator.manual_seed(context_seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(context_seed)
        if states is not None and rank < len(states["cpu"]):
            # PyTorch reads the memory from its start, whatever part of it a tensor is.
            torch.set_rng_state(states["cpu"][rank].clone())
            if device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
        yield


def random_states(device: torch.device, group: Ranks | None = None) -> dict[str, Tensor]:
    """Return the states of PyTorch's random numbers, for drawing_from: one row for each process of a group."""
    states = {"cpu": torch.get_rng_state()}
    states |= {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    group = Ranks() if group is None else group
    return {name: group.all_gather_rows(state[None], group.count) for name, state in states.items()}


class Position(NamedTuple):
    """How far an epoch has come, and what its further steps and its record depend on besides weights and optimiser.

    images: the place in the epoch's order up to which steps were taken; see Batch.
    steps: the number of these steps.
    rate: the learning rate of the last one.
    seconds: the time that they took.
    totals: what TrainingStep.totals returned.
    random: what random_states returned.
    """

    images: int
    steps: int
    rate: float
    seconds: float
    totals: Mapping[str, Any]
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class Keeping:
    """When and how a training stores where it is inside an epoch.

    due: a function that is called after every step with False, and after the last step of an epoch also with True. It
        returns whether the position is to be stored now.
    store: a function that stores the number of the epoch, counted from 0, and the position in it. The weights and the
        optimiser are those after the step. It is also called when the process is asked to end.
    """

    due: Callable[[int, bool], bool]
    store: Callable[[int, Position], object]


@dataclass(frozen=True)
class Plan:
    """The length and the learning rates of a training.

    epochs: the number of epochs.
    steps: the largest number of steps in an epoch.
    rate: the learning rate as a function of the epoch and of the step in it, both counted from 0.
    batches: a function from the number of an epoch, counted from 0, and a place in its order to its batches from there
        on; see Batch. The place is 0 or the end of a batch.
    lr: the value of the option that sets the learning rate, for the message of an error.
    option: the name of this option.
    seed: the seed of the random numbers that PyTorch draws itself.
    stage: the name of the stage, if a training has several.
    release: a function that is called when the end of an epoch has been stored, and frees what only that epoch needed.
    group: the processes that share the batches.
    """

    epochs: int
    steps: int
    rate: Callable[[int, int], float]
    batches: Callable[[int, int], Iterable[Batch]]
    lr: float
    option: str = "lr"
    seed: int = 0
    stage: str | None = None
    release: Callable[[], object] = lambda: None
    group: Ranks = field(default_factory=Ranks)


def epoch_name(stage: str | None, epoch: int) -> str:
    """Return the name of an epoch, counted from 0. The random numbers of the epoch depend on it and on the seed."""
    return f"{stage} epoch {epoch}" if stage else f"epoch {epoch}"


def train_epochs(
    step: TrainingStep,
    trained: nn.Module,
    plan: Plan,
    *,
    first: int = 0,
    position: Position | None = None,
    on_step: Callable[[], object] | None = None,
    keeping: Keeping | None = None,
) -> Iterator[dict[str, Any]]:
    """Train, and yield the record of each epoch when it is finished.

    step: takes the steps.
    trained: the module that holds everything that is trained.
    plan: the length, the batches and the learning rates of the training.
    first: the number of epochs that an earlier training has finished.
    position: how far it has come in the epoch after them, or None if it has not begun it.
    on_step: a function that is called after every step.
    keeping: how to store the position inside an epoch, or None if nothing is stored there.

    Raises UserError if the loss or a weight becomes NaN or infinite.
    """
    for epoch in range(first, plan.epochs):
        states = None if position is None else position.random
        with drawing_from(plan.seed, epoch_name(plan.stage, epoch), step.device, states, plan.group):
            record = _train_epoch(step, trained, plan, epoch, position, on_step, keeping)
        position = None
        yield record


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite. A sum is several times as fast as a look at each element."""
    # An element that is not finite makes the sum so. The sum of finite elements may overflow; then they are looked at.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _train_epoch(
    step: TrainingStep,
    trained: nn.Module,
    plan: Plan,
    epoch: int,
    position: Position | None,
    on_step: Callable[[], object] | None,
    keeping: Keeping | None,
) -> dict[str, Any]:
    """Train for one epoch, from a position in it, and return its record."""
    start, images, steps, last_rate = time.perf_counter(), 0, 0, plan.rate(epoch, 0)
    if position is not None:
        start -= position.seconds
        images, steps, last_rate = position[:3]
        step.load_totals(position.totals)

    stored, whole = steps, True

    def store() -> None:
        nonlocal stored
        if keeping is not None:
            seconds = time.perf_counter() - start
            here = Position(images, steps, last_rate, seconds, step.totals(), random_states(step.device, plan.group))
            keeping.store(epoch, here)
            stored = steps

    try:
        for batch in plan.batches(epoch, images):
            rate = plan.rate(epoch, steps)
            with termination.postponed():
                whole = False
                step(batch.inputs, batch.labels, rate, batch.ids, batch.counts)
                images, steps, last_rate, whole = batch.until, steps + 1, rate, True
            if on_step is not None:
                on_step()
            if keeping is not None and keeping.due(epoch, False):
                store()
        if keeping is not None and keeping.due(epoch, True):
            store()
    except KeyboardInterrupt:
        # The process was asked to end between two steps, or had no time to finish the present one.
        # Several processes could only do so together, and each of them is interrupted at another time.
        if whole and steps > stored and not plan.group.several:
            store()
        raise
    totals = step.read_totals()
    seconds = time.perf_counter() - start
    loss = totals.cross_entropy + step.gradients.penalty_weight * totals.penalty
    # The weights are checked too, because no loss has been computed with those of the last step.
    finite = all(is_finite(own_part(parameter)) for parameter in trained.parameters())
    finite = all(plan.group.all_gather(finite))
    if not math.isfinite(loss) or not finite:
        fault = "the weights no numbers" if math.isfinite(loss) else f"the loss {loss}"
        stage = f" of {plan.stage}" if plan.stage else ""
        raise UserError(f"{plan.option} {plan.lr} made {fault} in epoch {epoch + 1}{stage}: give a smaller one")
    return ({"stage": plan.stage} if plan.stage else {}) | {
        "epoch": epoch + 1,
        "lr": last_rate,
        "loss": round(loss, 6),
        "cross_entropy": round(totals.cross_entropy, 6),
        "penalty": round(totals.penalty, 8),
        "train_top1": round(100 * totals.accuracy, 3),
        "images": totals.images,
        "images_per_second": round(totals.images / seconds, 3),
        "seconds": round(seconds, 3),
    }


def training_time(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the seconds of all epochs, including those before an interruption, and their images per second."""
    seconds, images = (sum(record[name] for record in records) for name in ("seconds", "images"))
    return {
        "training_seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3) if seconds else None,
    }
