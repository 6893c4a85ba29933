"""The training loop of eft and fft: epochs and their records, learning rates, and the state to resume from."""

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
"""The inputs of a step and their labels (B,)."""
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function that computes the loss of inputs and labels, and returns it with its parts, as step_loss does."""


@dataclass
class Training:
    """The state of a training, and the file that stores it.

    folder: the folder of the run.
    state_file: the name of the file in this folder.
    trained: the modules that are trained and saved.
    optimizer: the optimiser of their parameters.
    scaler: the scaler of the loss for float16.
    name: the name of the stage, if a run has several.
    earlier_records: the records of the stages before this one.
    records: the records of the finished epochs.
    unreadable: the training images that could not be read, by id.
    kept_weights: the weights after an earlier epoch, if the next stage starts from them.
    """

    folder: RunFolder
    state_file: str
    trained: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    name: str | None = None
    earlier_records: Sequence[dict[str, Any]] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, Unreadable] = field(default_factory=dict)
    kept_weights: dict[str, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.trained.parameters()).device

    def epoch_name(self, epoch: int) -> str:
        """Return the name of an epoch, counted from 0. The random numbers of the epoch depend on it and on the seed."""
        return f"{self.name} epoch {epoch}" if self.name else f"epoch {epoch}"

    def resume(self) -> int:
        """Load the newest state of this training from the folder. Returns the number of finished epochs."""
        self.folder.load_state(self.state_file, self._restore)
        # The state contains the records too, so a crash between the two files leaves no line too few or too many.
        self.folder.write_lines(EPOCHS, [*self.earlier_records, *self.records])
        return len(self.records)

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises an exception before any change if the state does not fit."""
        records, kept_weights = list(state["records"]), state["kept"]
        unreadable = {image[0]: Unreadable(*image) for image in state["unreadable"]}
        scaler, optimizer, trained = state["scaler"], state["optimizer"], state["trained"]
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in self.trained.state_dict().items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in trained.items()} != expected:
            raise ValueError("it holds other weights")
        # Only parameters are checked, because a buffer may be infinite, such as the mask of an attention layer.
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
        self.records, self.kept_weights = records, kept_weights
        self.unreadable |= unreadable

    def save(self, record: dict[str, Any]) -> None:
        """Save the state after an epoch, then append the record of the epoch to epochs.jsonl."""
        self.records.append(record)
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "records": self.records,
            # Plain tuples, because a state is read without executing code.
            "unreadable": [tuple(image) for image in self.unreadable.values()],
            "kept": self.kept_weights,
        }
        self.folder.save_state(self.state_file, state)
        self.folder.append(EPOCHS, record)

    def note_unreadable(self, images: Iterable[Unreadable]) -> None:
        """Record training images that could not be read, each once."""
        self.unreadable |= {image.id: image for image in images}


@dataclass(frozen=True)
class Plan:
    """The length and the learning rates of a training.

    epochs: the number of epochs, including those of an earlier run.
    steps: the largest number of steps in an epoch.
    rate: the learning rate as a function of the epoch and of the step in it, both counted from 0.
    lr, option, micro_batch: see train_epoch.
    seed: the seed of the random numbers that PyTorch draws itself.
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
    """Train for the epochs that no earlier run has finished. Returns the number of those that were finished before.

    training: the state of the training.
    plan: the length and the learning rates of the training.
    batches: a function that returns the steps of an epoch, counted from 0.
    loss: the function that computes the loss.
    title: the title of the progress bar.
    after_epoch: a function that is called with the number of the epoch, counted from 0, and its record, before the
        state is saved. It may add entries to the record.

    Raises UserError if the loss or a weight becomes NaN or infinite.
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
    """Return the learning rate of a step: it rises linearly to lr during warmup steps, then falls to zero as a cosine.

    lr: the largest rate.
    step: the number of the step, counted from 0.
    total: the number of steps in all.
    warmup: the number of steps in which the rate rises.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def shuffled(count: int, batch_size: int, seed: int, name: str) -> list[Tensor]:
    """Return the indices of the images of each step, in an order that depends on the seed and the name alone.

    count: the number of images.
    batch_size: the number of images in a step.
    seed, name: the seed of the run, and the name of the epoch.
    """
    generator = torch.Generator().manual_seed(image_seed(seed, name))
    return list(torch.randperm(count, generator=generator).split(batch_size))


@contextmanager
def drawing_from(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Seed the random numbers that PyTorch draws itself, such as those of dropout, while the context lasts.

    They depend on the seed and the name alone, so a run that was interrupted and goes on draws the same numbers as one
    that was not.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        context_seed = image_seed(seed, f"{name} draws")
        # torch.manual_seed would seed every CUDA device too, and nothing would restore their states.
        torch.default_generator.manual_seed(context_seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(context_seed)
        yield


def step_loss(logits: Tensor, penalty: Tensor, target: Tensor, penalty_weight: float) -> tuple[Tensor, Tensor]:
    """Compute the loss of a step: the cross-entropy plus the weighted mask penalty.

    logits: (B, K).
    penalty: the mask penalty, one number.
    target: the labels (B,).
    penalty_weight: the factor of the penalty.

    Returns the loss, and a detached tensor (4,) of the loss, the cross-entropy, the penalty and the accuracy.
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

    training: the state of the training.
    batches: the inputs and labels of each step.
    loss: the function that computes the loss.
    rate: the learning rate of each step, counted from 0.
    lr: the value of the option that sets the learning rate, for the message of an error.
    option: the name of this option.
    micro_batch: the number of images that are computed at once, if a step accumulates the gradients of several parts.
    on_step: a function that is called after every step.

    Raises UserError if the loss or a weight becomes NaN or infinite.
    """
    start = time.perf_counter()
    device = training.device
    # The sums of loss, cross-entropy, penalty and accuracy stay on the device and are read once in an epoch.
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
    # The weights are checked too, because no loss has been computed with those of the last step.
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
    """Return the seconds of all epochs, including those before an interruption, and their images per second."""
    seconds, images = (sum(record[name] for record in records) for name in ("seconds", "images"))
    return {
        "training_seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3) if seconds else None,
    }
