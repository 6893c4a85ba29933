"""The training of eft and fft as a run: its epochs are recorded, and their state is saved to resume from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rada_fast.config.checks import Interval, interval_of
from rada_fast.engine.direct_steps import summed_up
from rada_fast.engine.optimizers import load_stored_state, stored_state
from rada_fast.engine.sharing import load_whole_weights, take_weights_of_first, whole_weights
from rada_fast.engine.steps import TrainingStep
from rada_fast.engine.training import Keeping, Plan, Position, train_epochs
from rada_fast.models.image_features import Unreadable
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.profiling import profiled
from rada_fast.runs.progress import progress
from rada_fast.system import ranks
from rada_fast.system.ranks import Ranks

EPOCHS = "epochs.jsonl"
NOTE_INTERVAL = 5.0
"""The seconds after which the progress shows the loss anew. Reading it makes a GPU wait."""
SAVE_SECONDS, SAVE_SHARE = 60.0, 0.01
"""The time between two saves inside of epochs unless an option says otherwise, and the largest share of the time that
saving may take then."""


class SaveClock:
    """Decide after each step whether the state inside the epoch is saved.

    every: the value of the option --save-every. None saves every SAVE_SECONDS or, if the last save took longer than
        SAVE_SHARE of that, more seldom.
    """

    def __init__(self, every: str | None) -> None:
        chosen = Interval(SAVE_SECONDS, None) if every is None else interval_of("save_every", every)
        self._seconds, self._steps = chosen
        self._adapts = every is None
        self._begin()

    def _begin(self) -> None:
        self._start, self._steps_since = time.monotonic(), 0

    def due(self) -> bool:
        """Count a step, and return whether the state is to be saved after it."""
        self._steps_since += 1
        if self._steps is not None:
            return self._steps_since >= self._steps
        return self._seconds is not None and time.monotonic() - self._start >= self._seconds

    def due_in(self, group: Ranks) -> bool:
        """Do the same as due in all processes of a group, of which the first decides if the time does."""
        own = self.due()
        if self._steps is not None or not group.several:
            return own
        decision = torch.tensor(float(own and group.first))
        group.all_reduce([decision])
        return bool(decision)

    def saved(self, seconds: float) -> None:
        """Start the next interval. seconds: how long the save has taken."""
        if self._adapts:
            self._seconds = max(SAVE_SECONDS, seconds / SAVE_SHARE)
        self._begin()


@dataclass
class Training:
    """The state of a training, and the file that stores it.

    folder: the folder of the run.
    state_file: the name of the file in this folder.
    trained: the modules that are trained and saved.
    optimizer: the optimiser of their parameters.
    scaler: the scaler of the loss for float16.
    earlier_records: the records of the stages before this one.
    records: the records of the finished epochs.
    unreadable: the training images that could not be read, by id.
    kept_weights: the weights after an earlier epoch, if the next stage starts from them.
    position: how far the epoch after the finished ones had come when the state was saved, or None if it had not begun.
    group: the processes that train together. They save one state together, which any number of processes can load.
    """

    folder: RunFolder
    state_file: str
    trained: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    earlier_records: Sequence[dict[str, Any]] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, Unreadable] = field(default_factory=dict)
    kept_weights: dict[str, Tensor] | None = None
    position: Position | None = None
    group: Ranks = field(default_factory=Ranks)

    def resume(self) -> int:
        """Load the newest state of this training from the folder. Returns the number of finished epochs."""
        self.folder.load_state(self.state_file, self._restore)
        # The state contains the records too, so a crash between the two files leaves no line too few or too many.
        self.folder.write_lines(EPOCHS, [*self.earlier_records, *self.records])
        self.folder.finished_epochs = len(self.earlier_records) + len(self.records)
        return len(self.records)

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises an exception before any change if the state does not fit."""
        records, kept_weights = list(state["records"]), state["kept"]
        position = None if state["position"] is None else Position(**state["position"])
        if position is not None and not (0 < position.steps <= position.images and position.seconds >= 0):
            raise ValueError("its position is no place in an epoch")
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
        load_stored_state(self.optimizer, optimizer)
        self.scaler.load_state_dict(scaler)
        load_whole_weights(self.trained, trained)
        self.records, self.kept_weights, self.position = records, kept_weights, position
        self.unreadable |= unreadable

    def save(self, record: dict[str, Any]) -> None:
        """Save the state after an epoch, then append the record of the epoch to epochs.jsonl."""
        self.records.append(record)
        self.save_state(None)
        self.folder.append(EPOCHS, record)
        self.folder.finished_epochs = len(self.earlier_records) + len(self.records)
        self.folder.log("epoch", record)

    def save_state(self, position: Position | None) -> None:
        """Save the present state. All processes of the group must call this together.

        position: the position inside an epoch, or None between two epochs.
        """
        for images in self.group.all_gather(list(self.unreadable.values())):
            self.note_unreadable(Unreadable(*image) for image in images)
        first = self.group.first
        state = {
            "trained": whole_weights(self.trained, keep=first),
            "optimizer": stored_state(self.optimizer, keep=first),
            "scaler": self.scaler.state_dict(),
            "records": self.records,
            # Plain tuples, because a state is read without executing code.
            "unreadable": [tuple(image) for image in self.unreadable.values()],
            "kept": self.kept_weights,
            "position": None if position is None else position._asdict(),
        }
        self.folder.save_state(self.state_file, state)

    def note_unreadable(self, images: Iterable[Unreadable]) -> None:
        """Record training images that could not be read, each once."""
        self.unreadable |= {image.id: image for image in images}


def loss_so_far(step: TrainingStep) -> str:
    """Return the loss and the share of right answers in the present epoch so far, in words. This waits for the device.

    Of several processes none knows those of the others.
    """
    if step.group.several:
        return ""
    totals = step.totals()
    sums = totals["sums"] if totals["waiting"] is None else totals["sums"] + summed_up(totals["waiting"])
    entropy, penalty, correct = (sums / max(totals["images"], 1)).tolist()
    return f"loss so far {entropy + step.gradients.penalty_weight * penalty:.4f}, right {100 * correct:.1f} %"


def train(
    training: Training,
    step: TrainingStep,
    plan: Plan,
    *,
    title: str,
    save_every: str | None = None,
    profile: bool = False,
    after_epoch: Callable[[int, dict[str, Any]], None] | None = None,
    evaluates: Callable[[int], bool] = lambda epoch: False,
) -> int:
    """Train for the epochs that no earlier run has finished. Returns the number of those that were finished before.

    training: the state of the training.
    step: takes the steps.
    plan: the length, the batches and the learning rates of the training.
    title: the title of the progress bar.
    save_every: see SaveClock.
    profile: whether to trace a few steps; see profiled.
    after_epoch: a function that is called with the number of the epoch, counted from 0, and its record, before the
        state is saved. It may add entries to the record.
    evaluates: whether this function takes long after an epoch, so that the state is also saved before it.

    Raises UserError if the loss or a weight becomes NaN or infinite.
    """
    first, clock = training.resume(), SaveClock(save_every)
    position = training.position

    def store(epoch: int, here: Position) -> None:
        start = time.monotonic()
        training.save_state(here)
        clock.saved(time.monotonic() - start)

    def due(epoch: int, ended: bool) -> bool:
        return evaluates(epoch) if ended else clock.due_in(step.group)

    keeping = Keeping(due, store)
    remaining = (plan.epochs - first) * plan.steps - (0 if position is None else position.steps)
    prefix = f"{plan.stage}-" if plan.stage else ""
    with (
        progress(title, remaining, unit="steps") as advance,
        profiled(profile and ranks.current().first, training.folder.path, "steps", prefix) as on_step,
    ):
        told = time.monotonic()

        def after_step() -> None:
            nonlocal told
            note = ""
            if (now := time.monotonic()) - told >= NOTE_INTERVAL:
                note, told = loss_so_far(step), now
            advance(note=note)
            on_step()

        records = train_epochs(
            step, training.trained, plan, first=first, position=position, on_step=after_step, keeping=keeping
        )
        for epoch, record in enumerate(records, start=first):
            take_weights_of_first(training.trained)
            if after_epoch is not None:
                after_epoch(epoch, record)
            start = time.monotonic()
            training.save(record)
            plan.release()
            if evaluates(epoch):
                training.folder.release()
            clock.saved(time.monotonic() - start)
            advance(
                0,
                note=f"epoch {epoch + 1}/{plan.epochs}: loss {record['loss']:.4f}, right {record['train_top1']:.1f} %",
            )
    return first
