"""Full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C): a linear classifier replaces the text encoder.

The first stage, RAda, trains adapter and classifier over frozen encoders with the mask penalty (Eq. 14). The second
stage, RAda-FT, starts from the weights of the first stage after a few of its epochs and trains adapter, classifier and
image encoder without the penalty (Eq. 15).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rada_fast.config.commands import FFTOptions
from rada_fast.data.sources import Source
from rada_fast.data.views import image_seed
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.training import (
    Batch,
    Plan,
    Training,
    shuffled,
    step_loss,
    train,
    training_time,
    warm_up_then_cosine,
)
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import Features, Unreadable, check_some_readable, features_of, iterate_views
from rada_fast.modules.rational_classifier import RationalClassifier
from rada_fast.reports.summary import accuracy_of, already_finished, finish, unreadable_records
from rada_fast.runs.folder import RunFolder, reset_peak_memory

IMAGES = "images.jsonl"
TRAIN_CROP_SCALE = (0.9, 1.0)
"""The smallest and the largest share of the picture in a training crop, as in the training defaults of open_clip."""


@dataclass(frozen=True)
class Stage:
    """One of the two stages of training.

    name: "rada" or "rada-ft".
    epochs: the number of epochs.
    lr: the largest learning rate.
    penalty_weight: the factor of the mask penalty in the loss.
    trains_encoder: whether the stage trains the image encoder too.
    """

    name: str
    epochs: int
    lr: float
    penalty_weight: float
    trains_encoder: bool


@dataclass(frozen=True)
class Task:
    """Everything that a run of fft works on.

    setup: the set-up of the run, with the classes that are trained.
    stages: the stages of training, in their order.
    images: the training images.
    features: the features of their centre views, if a stage or the text features need them.
    evaluation: the data to evaluate on, by their KIND:PATH.
    limit: the largest number of training images, or None if all images are used.
    """

    setup: Setup
    stages: tuple[Stage, ...]
    images: Source
    features: Features | None
    evaluation: dict[str, Source]
    limit: int | None

    @property
    def num_images(self) -> int:
        """The number of training images: all image files, readable or not, or the rows of a feature file."""
        return len(self.images.samples) or len(self.features.ids if self.features is not None else ())


def run_fft(options: FFTOptions) -> dict[str, Any]:
    """Train the stages, evaluate after each of them, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    task = open_task(options)
    setup = task.setup
    read = {**setup.sources, "train": task.images}
    # The training images alone decide the weights.
    with open_folder(setup, read, deciding=["train"], names=setup.names, text=setup.text, limit=task.limit) as folder:
        scope = {"limit": options.run.limit}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=sum(stage.epochs for stage in task.stages))
        results, resumed = train_and_evaluate(task, options, folder)
        return finish(folder, setup.facts(), results, scope=scope, resumed=resumed)


def open_task(options: FFTOptions) -> Task:
    """Open the data, the model and the other files that the options name.

    Raises UserError naming an option that cannot be used.
    """
    stages = [Stage("rada", options.epochs, options.lr, options.penalty_weight, trains_encoder=False)]
    only_images = None
    if options.stages == "both":
        only_images = "stages both trains the image encoder and needs images; with feature files give rada"
        stages.append(Stage("rada-ft", options.finetune_epochs, options.finetune_lr, 0.0, trains_encoder=True))
    parts = {spec: f"test {spec}" for spec in options.test}
    specs = {"train": options.train, **{part: spec for spec, part in parts.items()}}
    opened = open_data_and_model(options, specs, only_images=only_images)
    source, evaluation = opened.sources["train"], {spec: opened.sources[part] for spec, part in parts.items()}

    names = class_names_of(source, options.text.classes, prompts=options.text.text_features is None)
    for spec, data in evaluation.items():
        if (fault := data.classes_beyond(source)) is not None:
            raise UserError(f"test {spec} must have no classes but those of train {options.train}: {fault}")

    images, features = source.limited(options.run.limit), None
    if not images.holds_images or options.train_views == "center" or options.text.text_features == "class-means":
        features = features_of(images, opened.model, title="encode training images", workers=options.run.workers)
    (text,) = text_features(options.text, [ClassGroup(names, features)], opened.model, opened.text_file)
    setup = open_setup("fft", options, opened, names, text)
    limit = options.run.limit if len(images.ids) < len(source.ids) else None
    return Task(setup, tuple(stages), images, features, evaluation, limit)


def train_and_evaluate(task: Task, options: FFTOptions, folder: RunFolder) -> tuple[dict[str, Any], int]:
    """Train and evaluate every stage.

    Returns the results, and the number of epochs that an earlier run had finished.
    """
    setup = task.setup
    reset_peak_memory()
    start = time.perf_counter()
    model = RationalClassifier(setup.text, setup.adapter, setup.logit_scale).to(setup.device)
    results: dict[str, Any] = {"training_images": task.num_images, "classes": len(setup.names)}
    done: list[Training] = []
    lines, resumed = [], 0
    for stage in task.stages:
        training, first = train_stage(stage, model, task, options, done, folder)
        done.append(training)
        resumed += first
        save_weights(stage, model, setup, folder)
        results[stage.name], records = evaluate_stage(stage, model, task)
        lines += records
    folder.accept_inputs()
    unreadable = {image.id: image for training in done for image in training.unreadable.values()}
    folder.write_lines(IMAGES, [{"train": True} | record for record in unreadable_records(unreadable.values())] + lines)
    # An image is evaluated after every stage, but counts once.
    unreadable_evaluated = {(line["test"], line["id"]) for line in lines if line["status"] == "unreadable"}
    results["unreadable"] = len(unreadable) + len(unreadable_evaluated)
    epochs = [record for training in done for record in training.records]
    results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(epochs)}
    return results, resumed


@dataclass
class Batches:
    """The training batches of a stage, in an order that depends on the seed, the stage and the epoch alone.

    task: the data and the set-up of the run.
    stage: the stage of training.
    batch_size: the number of images in a step.
    crops: whether each epoch makes new random crops.
    ids: the names of the images of the current step that are not encoded yet.
    """

    task: Task
    stage: Stage
    batch_size: int
    crops: bool
    ids: list[str] = field(default_factory=list)

    @property
    def fixed(self) -> Features | None:
        """The features that every epoch uses, or None if each epoch reads the images."""
        reads_images = self.stage.trains_encoder or (self.crops and self.task.images.holds_images)
        return None if reads_images else self.task.features

    @property
    def steps(self) -> int:
        """The largest number of steps in an epoch. A step is left out if none of its images can be read."""
        fixed = self.fixed
        count = len(self.task.images.samples) if fixed is None else len(fixed.labels)
        return -(-count // self.batch_size)

    def take_ids(self, count: int) -> list[str]:
        """Remove the names of the next images of the current step from the list, and return them."""
        taken, self.ids = self.ids[:count], self.ids[count:]
        return taken

    def epoch(self, epoch: int, training: Training) -> Iterator[Batch]:
        """Yield the inputs and labels of each step of an epoch.

        The inputs are images (B, 3, S, S), or unit-norm features (B, D) if every epoch uses the same features. Images
        that cannot be read are recorded in the training. Raises UserError if no image can be read.
        """
        run = self.task.setup.options.run
        name = training.epoch_name(epoch)
        if (fixed := self.fixed) is not None:
            training.note_unreadable(fixed.unreadable)
            for step in shuffled(len(fixed.labels), self.batch_size, run.seed, name):
                yield fixed.features[step], fixed.labels[step]
            return
        images = self.task.images.samples
        unreadable = []
        for step in shuffled(len(images), self.batch_size, run.seed, name):
            samples = [images[index] for index in step.tolist()]
            views, labels = [], []
            self.ids = []
            stream = iterate_views(
                samples,
                self.task.setup.model.loaded(),
                views=0 if self.crops else 1,
                kind="crop",
                seed=image_seed(run.seed, f"{self.stage.name} views {epoch}"),
                workers=run.workers,
                crop_scale=TRAIN_CROP_SCALE,
            )
            for index, view, reason in stream:
                if view is None:
                    unreadable.append(Unreadable(samples[index].id, samples[index].label, reason or ""))
                else:
                    views.append(view[0])
                    labels.append(samples[index].label)
                    self.ids.append(samples[index].id)
            if views:
                yield torch.stack(views), torch.tensor(labels)
        check_some_readable(unreadable, images)
        training.note_unreadable(unreadable)


def learning_rate(stage: Stage, warmup_steps: int, step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0, of a stage with total steps.

    The rate rises linearly during the warm-up, and then falls to zero as a cosine.
    """
    return warm_up_then_cosine(stage.lr, step, total, min(warmup_steps, total // 5))


def train_stage(
    stage: Stage, model: RationalClassifier, task: Task, options: FFTOptions, done: list[Training], folder: RunFolder
) -> tuple[Training, int]:
    """Train one stage for the epochs that no earlier run has finished.

    stage: the stage to train.
    model: the adapter and the classifier.
    task: the data and the set-up of the run.
    options: the options of the command.
    done: the trainings of the stages before this one.
    folder: the folder of the run.

    Returns the training, and the number of epochs that an earlier run had finished.
    """
    setup = task.setup
    trained = nn.ModuleList([model])
    if stage.trains_encoder:
        assert done[0].kept_weights is not None
        model.load_state_dict(done[0].kept_weights)
        visual = setup.model.loaded().model.visual
        trained.append(visual)
        visual.requires_grad_(True).train()
    training = Training(
        folder,
        f"{stage.name}.pt",
        trained,
        AdamW(trained.parameters(), lr=stage.lr, weight_decay=options.weight_decay),
        torch.amp.GradScaler(setup.device.type, enabled=stage.trains_encoder and setup.model.precision == "float16"),
        name=stage.name,
        earlier_records=[record for previous in done for record in previous.records],
    )
    batches = Batches(task, stage, options.batch_size, crops=options.train_views == "crop")

    def loss(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.ndim == 4:
            vlm, ids = setup.model.loaded(), batches.take_ids(len(inputs))
            if not stage.trains_encoder:
                inputs = vlm.encode_images(inputs, ids)
            else:
                inputs = vlm.image_features_with_grad(inputs)
                # An overflow in float32 after a step is caused by the learning rate, which train_epoch reports.
                if vlm.precision != "float32" or not training.optimizer.state:
                    vlm.check_features(inputs, "image", ids)
        logits, penalty = model(inputs, options.penalty)
        return step_loss(logits, penalty, target, stage.penalty_weight)

    def after_epoch(epoch: int, record: dict[str, Any]) -> None:
        if not stage.trains_encoder and epoch + 1 == options.finetune_from:
            training.kept_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    steps = batches.steps
    plan = Plan(
        stage.epochs,
        steps,
        lambda epoch, step: learning_rate(stage, options.warmup_steps, epoch * steps + step, stage.epochs * steps),
        stage.lr,
        option="finetune_lr" if stage.trains_encoder else "lr",
        micro_batch=options.micro_batch,
        seed=options.run.seed,
    )
    title = f"full fine-tuning, {stage.name}"
    resumed = train(
        training, plan, lambda epoch: batches.epoch(epoch, training), loss, title=title, after_epoch=after_epoch
    )
    if stage.trains_encoder:
        visual.requires_grad_(False).eval()
    return training, resumed


def save_weights(stage: Stage, model: RationalClassifier, setup: Setup, folder: RunFolder) -> None:
    """Write the adapter and the classifier of a stage and, if it was trained, the image encoder, as safetensors."""
    folder.save_adapter(f"{stage.name}-adapter.safetensors", model.adapter)
    tensors: dict[str, Tensor] = {"classifier.weight": model.weight}
    if stage.trains_encoder:
        visual = setup.model.loaded().model.visual.state_dict()
        tensors |= {f"visual.{name}": tensor for name, tensor in visual.items()}
    folder.save_tensors(f"{stage.name}-model.safetensors", tensors)


def evaluate_stage(stage: Stage, model: RationalClassifier, task: Task) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a stage. Returns the accuracies, zero-shot and after the stage, and a record of every image.

    If data have only some of the training classes, such as the 200 of ImageNet-A, only these classes are predicted.
    """
    setup = task.setup

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model.adapter(images, model.weight, model.logit_scale)
        return logits

    run = setup.options.run
    results, lines = {}, []
    for spec, source in task.evaluation.items():
        title = f"test {spec} after {stage.name}"
        # The cached features were computed by the encoder as it was loaded, so they do not fit a trained encoder.
        cached = not stage.trains_encoder
        images = features_of(source, setup.model, title=title, workers=run.workers, limit=run.limit, cached=cached)
        records = evaluate(
            predict,
            images,
            setup.text,
            model.logit_scale,
            title=title,
            device=setup.device,
            labels=source.labels_among(setup.sources["train"]),
        )
        lines += [{"stage": stage.name, "test": spec} | record for record in records]
        results[spec] = accuracy_of(records, before="zero_shot", after="adapted")
    return results, lines
