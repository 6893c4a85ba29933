"""The training loop of eft and fft: epochs and their records, schedules, and the state from which a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from rada_fast.data.views import image_seed
from rada_fast.errors import UserError
from rada_fast.models.image_features import Unreadable
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.progress import progress

EPOCHS = "epochs.jsonl"

Batch = tuple[Tensor, Tensor]
"""The inputs of a step, and their labels (B,)."""
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function of inputs and labels that returns the loss and, as step_loss does, its parts."""


@dataclass
class Training:
    """A training that is under way, and the file that keeps its state.

    state_file: a file in the run's folder; trained: the modules whose weights are saved; name: the name of the stage,
    where a run has several; earlier: the records of the stages before it; records: one for every finished epoch;
    unreadable: the training images that could not be read, by id; kept: the weights after an earlier epoch, for a stage
    that starts from them.
    """

    folder: RunFolder
    state_file: str
    trained: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    name: str | None = None
    earlier: Sequence[dict[str, Any]] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, Unreadable] = field(default_factory=dict)
    kept: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.trained.parameters()).device

    def epoch_name(self, epoch: int) -> str:
        """The name under which the draws of an epoch, counted from 0, are seeded."""
        return f"{self.name} epoch {epoch}" if self.name else f"epoch {epoch}"

    def resume(self) -> int:
        """Take up what the folder holds of this training; returns the number of finished epochs."""
        self.folder.load_state(self.state_file, self._take)
        # The state holds the lines too, so that a crash between the two leaves no line too few or too many.
        self.folder.write_lines(EPOCHS, [*self.earlier, *self.records])
        return len(self.records)

    def _take(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises whatever comes where it is not this training's, before anything is changed."""
        records, kept = list(state["records"]), state["kept"]
        unreadable = {image[0]: Unreadable(*image) for image in state["unreadable"]}
        scaler, optimizer, trained = state["scaler"], state["optimizer"], state["trained"]
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in self.trained.state_dict().items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in trained.items()} != wanted:
            raise ValueError("it holds other weights")
        # Buffers may well be infinite, as a mask of attention is.
        if not all(bool(trained[name].isfinite().all()) for name, _ in self.trained.named_parameters()):
            raise ValueError("it holds weights that are no numbers")
        numbers = [(record["epoch"], record["seconds"] + record["images"]) for record in records]
        if [epoch for epoch, _ in numbers] != list(range(1, len(records) + 1)):
            raise ValueError("its epochs do not count from 1")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, moments in optimizer["state"].items():
            shapes = {value.shape for value in moments.values() if isinstance(value, Tensor) and value.ndim}
            if not shapes <= {parameters[index].shape}:
                raise ValueError("its optimizer is one of other weights")
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(scaler)
        self.trained.load_state_dict(trained)
        self.records, self.kept = records, kept
        self.unreadable |= unreadable

    def save(self, record: dict[str, Any]) -> None:
        """Save the state after an epoch, then add the epoch's line."""
        self.records.append(record)
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "records": self.records,
            # Plain tuples, because a state is read without executing code.
            "unreadable": [tuple(image) for image in self.unreadable.values()],
            "kept": self.kept,
        }
        self.folder.save_state(self.state_file, state)
        self.folder.append(EPOCHS, record)

    def note_unreadable(self, images: Iterable[Unreadable]) -> None:
        """Remember training images that could not be read, each once."""
        self.unreadable |= {image.id: image for image in images}


@dataclass(frozen=True)
class Plan:
    """How long a training lasts and how fast it learns.

    epochs: their number, those of an earlier run included; steps: the most steps of an epoch; rate: the learning rate
    as a function of the epoch and the step in it, both counted from 0; lr, option, micro_batch: see train_epoch; seed:
    of PyTorch's own draws.
    """

    epochs: int
    steps: int
    rate: Callable[[int, int], float]
    lr: float
    option: str = "lr"
    micro_batch: int | None = None
    seed: int = 0


def train(
    training: Training,
    plan: Plan,
    batches: Callable[[int], Iterable[Batch]],
    loss: Loss,
    *,
    title: str,
    after_epoch: Callable[[int, dict[str, Any]], None] | None = None,
) -> int:
    """Train, or do what is left of it; returns how many epochs an earlier run had finished.

    batches: the steps of an epoch; title: of the progress bar; after_epoch: called with the number of the epoch, from
    0, and its record, to which it may add, before the state is saved.

    Raises UserError where the loss or a weight is no number.
    """
    first = training.resume()
    with progress(title, (plan.epochs - first) * plan.steps) as advance:
        for epoch in range(first, plan.epochs):

            def rate(step: int, epoch: int = epoch) -> float:
                return plan.rate(epoch, step)

            with drawing_from(plan.seed, training.epoch_name(epoch), training.device):
                record = train_epoch(
                    training,
                    batches(epoch),
                    loss,
                    rate,
                    lr=plan.lr,
                    option=plan.option,
                    micro_batch=plan.micro_batch,
                    on_step=advance,
                )
            if after_epoch is not None:
                after_epoch(epoch, record)
            training.save(record)
            advance(0, note=f"loss {record['loss']:.4f}")
    return first


def warm_up_then_cosine(lr: float, step: int, total: int, warmup: int) -> float:
    """The rate of a step, counted from 0 of total: it rises linearly to lr, then follows a cosine to zero."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def shuffled(count: int, batch_size: int, seed: int, name: str) -> list[Tensor]:
    """The indices of the images of each step, in an order that depends on the seed and the name alone."""
    generator = torch.Generator().manual_seed(image_seed(seed, name))
    return list(torch.randperm(count, generator=generator).split(batch_size))


@contextmanager
def drawing_from(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Within this context PyTorch's own draws, such as an encoder's dropout, depend on the seed and the name alone.

    A run that was cut off and goes on therefore draws what an uninterrupted one would have drawn.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        drawn = image_seed(seed, f"{name} draws")
        # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
        torch.default_generator.manual_seed(drawn)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(drawn)
        yield


def step_loss(logits: Tensor, penalty: Tensor, target: Tensor, penalty_weight: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy plus the weighted mask penalty, and its parts for the record.

    The parts are the loss, the cross-entropy, the penalty and the accuracy, detached, in one tensor (4,).
    """
    entropy = cross_entropy(logits, target)
    loss = entropy + penalty_weight * penalty if penalty_weight else entropy
    accuracy = (logits.argmax(dim=-1) == target).float().mean()
    return loss, torch.stack([part.detach() for part in (loss, entropy, penalty, accuracy)])


def train_epoch(
    training: Training,
    batches: Iterable[Batch],
    loss: Loss,
    rate: Callable[[int], float],
    *,
    lr: float,
    option: str = "lr",
    micro_batch: int | None = None,
    on_step: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Train for one epoch and return its record.

    rate: the learning rate of a step; lr, option: the value that sets it, and the name of its option; micro_batch: the
    images that are computed at once, where a step accumulates the gradients of several parts; on_step: called after
    every step.

    Raises UserError where the loss or a weight is no number.
    """
    start = time.perf_counter()
    device = training.device
    # Sums stay on the device and are read once an epoch: loss, cross-entropy, penalty, accuracy.
    sums, count, last_rate = torch.zeros(4, device=device), 0, rate(0)
    for step, (inputs, labels) in enumerate(batches):
        last_rate = rate(step)
        for group in training.optimizer.param_groups:
            group["lr"] = last_rate
        training.optimizer.zero_grad()
        part = micro_batch or len(labels)
        for some, target in zip(inputs.split(part), labels.split(part), strict=True):
            value, parts = loss(some.to(device), target.to(device))
            training.scaler.scale(value * (len(target) / len(labels))).backward()
            sums += parts * len(target)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        count += len(labels)
        if on_step is not None:
            on_step()
    mean, entropy, penalty, accuracy = (sums / max(count, 1)).tolist()
    epoch, seconds = len(training.records) + 1, time.perf_counter() - start
    # The last step's weights have made no loss yet.
    finite = all(bool(parameter.isfinite().all()) for parameter in training.trained.parameters())
    if not math.isfinite(mean) or not finite:
        fault = "the weights no numbers" if math.isfinite(mean) else f"the loss {mean}"
        stage = f" of {training.name}" if training.name else ""
        raise UserError(f"{option} {lr} made {fault} in epoch {epoch}{stage}: give a smaller one")
    return ({"stage": training.name} if training.name else {}) | {
        "epoch": epoch,
        "lr": last_rate,
        "loss": round(mean, 6),
        "cross_entropy": round(entropy, 6),
        "penalty": round(penalty, 8),
        "train_top1": round(100 * accuracy, 3),
        "images": count,
        "images_per_second": round(count / seconds, 3),
        "seconds": round(seconds, 3),
    }


def training_time(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of all epochs, those before an interruption included, and their images per second."""
    seconds, images = (sum(record[name] for record in records) for name in ("seconds", "images"))
    return {
        "training_seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3) if seconds else None,
    }
