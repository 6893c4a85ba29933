"""Full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C): a linear classifier replaces the text encoder.

RAda trains adapter and classifier over frozen encoders with the mask penalty (Eq. 14); RAda-FT goes on from its weights
after a few epochs and trains everything without it (Eq. 15).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rada_fast.config.commands import FFTOptions
from rada_fast.data.sources import Source
from rada_fast.data.views import image_seed
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import evaluate, unreadable_records
from rada_fast.loops.features import Features, check_some_readable, iterate_views
from rada_fast.loops.setup import Problem, open_setup, open_sources
from rada_fast.loops.training import (
    Batch,
    Training,
    drawing_from,
    shuffled,
    step_loss,
    train_epoch,
    training_time,
    warm_up_then_cosine,
)
from rada_fast.modules.rational_classifier import RationalClassifier
from rada_fast.reports.summary import accuracy_of, already_finished, finish
from rada_fast.runs.folder import RunFolder, reset_peak_memory
from rada_fast.runs.identity import open_folder
from rada_fast.runs.progress import progress

IMAGES = "images.jsonl"
TRAIN_CROP_SCALE = (0.9, 1.0)
"""Share of the picture in a training crop, open_clip's own training default."""


@dataclass(frozen=True)
class Stage:
    """One of the two trainings."""

    name: str
    epochs: int
    lr: float
    penalty_weight: float
    trains_encoder: bool


def run_fft(config: FFTOptions) -> dict[str, Any]:
    """Train both stages and test after each; returns the summary that it also writes.

    Raises UserError naming an option that cannot be used.
    """
    sources = open_sources({"train": config.train, **{f"test {spec}": spec for spec in config.test}})
    train, tests = sources["train"], {spec: sources[f"test {spec}"] for spec in config.test}
    stages = [Stage("rada", config.epochs, config.lr, config.penalty_weight, trains_encoder=False)]
    if config.stages == "both":
        if not all(source.holds_images for source in sources.values()):
            raise UserError("stages both trains the image encoder and needs images; with feature files give rada")
        stages.append(Stage("rada-ft", config.finetune_epochs, config.finetune_lr, 0.0, trains_encoder=True))

    setup = open_setup(config, sources)
    names = setup.class_names(train)
    check_classes(config, train, tests)
    features = None
    if not train.holds_images or config.train_views == "center" or config.text.text_features == "class-means":
        features = setup.features(train, title="encode training images", limit=config.run.limit)
    problem = setup.problem(names, setup.text_features(names, features))
    if features is not None:
        problem.check_width(features.features.shape[-1], f"--train {config.train}")
    for spec, source in tests.items():
        problem.check_width(source.width, f"--test {spec}")
    batches = Batches(config, problem, features)
    with open_run_folder(problem, batches, config) as folder:
        covers = {"limit": config.run.limit}
        if (summary := folder.finished(covers)) is not None:
            return already_finished(folder, summary, resumed=sum(stage.epochs for stage in stages))
        results, resumed = train_and_test(stages, problem, batches, tests, folder)
        return finish(folder, "fft", problem, results, covers=covers, resumed=resumed)


def open_run_folder(problem: Problem, batches: Batches, config: FFTOptions) -> RunFolder:
    """The run's folder: the images that are trained on decide the weights."""
    train = batches.source
    limit = config.run.limit
    return open_folder(
        "fft",
        problem,
        {**problem.sources, "train": train},
        deciding=["train"],
        names=problem.names,
        text=problem.text,
        limit=limit if limit is not None and len(batches) < batches.available else None,
    )


def train_and_test(
    stages: list[Stage], problem: Problem, batches: Batches, tests: dict[str, Source], folder: RunFolder
) -> tuple[dict[str, Any], int]:
    """Every stage's training and test; returns the results and how many epochs an earlier run had finished."""
    reset_peak_memory()
    start = time.perf_counter()
    model = RationalClassifier(problem.text, problem.adapter, problem.logit_scale).to(problem.device)
    results: dict[str, Any] = {"training_images": len(batches), "classes": len(problem.names)}
    done: list[Training] = []
    lines, resumed = [], 0
    for stage in stages:
        training, first = train_stage(stage, model, problem, batches, done, folder)
        done.append(training)
        resumed += first
        save_weights(stage, model, problem, folder)
        results[stage.name], records = test_stage(stage, model, problem, tests)
        lines += records
    folder.accept_inputs()
    unreadable = {image[0]: image for training in done for image in training.unreadable.values()}
    folder.write_lines(IMAGES, [{"train": True} | record for record in unreadable_records(unreadable.values())] + lines)
    # An image is tested after every stage, and counts once.
    torn = {(line["test"], line["id"]) for line in lines if line["status"] == "unreadable"}
    results["unreadable"] = len(unreadable) + len(torn)
    epochs = [record for training in done for record in training.records]
    results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(epochs)}
    return results, resumed


def check_classes(config: FFTOptions, train: Source, tests: dict[str, Source]) -> None:
    """Raise UserError where a test set has classes that were not trained."""
    for spec, source in tests.items():
        if (fault := source.classes_beyond(train)) is not None:
            raise UserError(f"test {spec} must have no classes but those of train {config.train}: {fault}")


class Batches:
    """Training batches: (features or images, labels), in an order drawn from (seed, stage, epoch)."""

    def __init__(self, config: FFTOptions, problem: Problem, features: Features | None) -> None:
        train = problem.sources["train"]
        self.config = config
        self.problem = problem
        self.features = features
        self.source = train.limited(config.run.limit)
        self.samples = self.source.samples
        self.ids: list[str] = []
        """Of the images of the step under way that are still to be encoded."""
        self.available = len(train.ids)

    def __len__(self) -> int:
        return len(self.samples) if self.samples else len(self.features.ids) if self.features else 0

    def take_ids(self, count: int) -> list[str]:
        """What the next count images of the step are called."""
        taken, self.ids = self.ids[:count], self.ids[count:]
        return taken

    def fixed(self, stage: Stage) -> Features | None:
        """The features that serve every epoch of a stage, or None where each epoch makes views of its own."""
        if stage.trains_encoder or (self.samples and self.config.train_views == "crop"):
            return None
        return self.features

    def steps(self, stage: Stage) -> int:
        """Steps of an epoch, at most: one whose images are all unreadable is left out."""
        fixed = self.fixed(stage)
        count = len(self.samples) if fixed is None else len(fixed.labels)
        return -(-count // self.config.batch_size)

    def epoch(self, stage: Stage, epoch: int, training: Training) -> Iterator[Batch]:
        """Steps of an epoch. For the encoder's training, images (B, 3, S, S); else unit-norm features (B, D).

        What cannot be read is noted in the training. Raises UserError where nothing can.
        """
        config, fixed = self.config, self.fixed(stage)
        count = len(self.samples) if fixed is None else len(fixed.labels)
        order = shuffled(count, config.batch_size, config.run.seed, f"{stage.name} epoch {epoch}")
        if fixed is not None:
            training.note_unreadable(fixed.unreadable)
            for step in order:
                yield fixed.features[step], fixed.labels[step]
            return
        unreadable = []
        for step in order:
            samples = [self.samples[index] for index in step.tolist()]
            images, labels = [], []
            self.ids = []
            crops = config.train_views == "crop"
            stream = iterate_views(
                samples,
                self.problem.model,
                views=0 if crops else 1,
                kind="crop",
                seed=image_seed(config.run.seed, f"{stage.name} views {epoch}"),
                workers=config.run.workers,
                crop_scale=TRAIN_CROP_SCALE,
            )
            for index, view, reason in stream:
                if view is None:
                    unreadable.append((samples[index].id, samples[index].label, reason or ""))
                else:
                    images.append(view[0])
                    labels.append(samples[index].label)
                    self.ids.append(samples[index].id)
            if images:
                yield torch.stack(images), torch.tensor(labels)
        check_some_readable(unreadable, self.samples)
        training.note_unreadable(unreadable)


def learning_rate(stage: Stage, config: FFTOptions, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero. step: from 0; total: the stage's steps."""
    return warm_up_then_cosine(stage.lr, step, total, min(config.warmup_steps, total // 5))


def _scales(stage: Stage, problem: Problem) -> bool:
    return stage.trains_encoder and problem.model.precision == "float16"


def train_stage(
    stage: Stage,
    model: RationalClassifier,
    problem: Problem,
    batches: Batches,
    done: list[Training],
    folder: RunFolder,
) -> tuple[Training, int]:
    """Train one stage, or what is left of it; returns the training and how many epochs an earlier run had finished.

    done: the stages before it.
    """
    config = batches.config
    trained = nn.ModuleList([model])
    if stage.trains_encoder:
        assert done[0].kept is not None
        model.load_state_dict(done[0].kept)
        visual = problem.model.model.visual
        trained.append(visual)
        visual.requires_grad_(True).train()
    training = Training(
        folder,
        f"{stage.name}.pt",
        trained,
        AdamW(trained.parameters(), lr=stage.lr, weight_decay=config.weight_decay),
        torch.amp.GradScaler(
            problem.device.type, enabled=stage.trains_encoder and problem.model.precision == "float16"
        ),
        name=stage.name,
        earlier=[record for earlier in done for record in earlier.records],
    )
    first = training.resume()
    steps = batches.steps(stage)

    def loss(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.ndim == 4:
            vlm, ids = problem.model, batches.take_ids(len(inputs))
            if not stage.trains_encoder:
                inputs = vlm.encode_images(inputs, ids)
            else:
                inputs = vlm.image_features_with_grad(inputs)
                # In float32 and after a step it is the learning rate that makes an encoder overflow.
                if vlm.precision != "float32" or not training.optimizer.state:
                    vlm.check_features(inputs, "image", ids)
        logits, penalty = model(inputs, config.penalty)
        return step_loss(logits, penalty, target, stage.penalty_weight)

    with progress(f"full fine-tuning, {stage.name}", (stage.epochs - first) * steps) as advance:
        for epoch in range(first, stage.epochs):

            def rate(step: int, before: int = epoch * steps) -> float:
                return learning_rate(stage, config, before + step, stage.epochs * steps)

            with drawing_from(config.run.seed, f"{stage.name} epoch {epoch}", problem.device):
                record = train_epoch(
                    training,
                    batches.epoch(stage, epoch, training),
                    loss,
                    rate,
                    lr=stage.lr,
                    option="finetune_lr" if stage.trains_encoder else "lr",
                    micro_batch=config.micro_batch,
                    on_step=advance,
                )
            if not stage.trains_encoder and epoch + 1 == config.finetune_from:
                training.kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            training.save(record)
    if stage.trains_encoder:
        problem.model.model.visual.requires_grad_(False).eval()
    return training, first


def save_weights(stage: Stage, model: RationalClassifier, problem: Problem, folder: RunFolder) -> None:
    """The stage's adapter, classifier and, where it was trained, image encoder, as safetensors."""
    folder.save_adapter(f"{stage.name}-adapter.safetensors", model.adapter)
    tensors: dict[str, Tensor] = {"classifier.weight": model.weight}
    if stage.trains_encoder:
        visual = problem.model.model.visual.state_dict()
        tensors |= {f"visual.{name}": tensor for name, tensor in visual.items()}
    folder.save_tensors(f"{stage.name}-model.safetensors", tensors)


def test_stage(
    stage: Stage, model: RationalClassifier, problem: Problem, tests: dict[str, Source]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracies on every test set, of the zero-shot model and after this stage; and a record for every image.

    A set with some of the training classes, as ImageNet-A's 200, is judged among those.
    """
    train = problem.sources["train"]

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model.adapter(images, model.weight, model.logit_scale)
        return logits

    results, lines = {}, []
    for spec, source in tests.items():
        title = f"test {spec} after {stage.name}"
        limit = problem.config.run.limit
        features = problem.features(source, title=title, limit=limit, cached=not stage.trains_encoder)
        records = evaluate(
            predict,
            features,
            problem.text,
            model.logit_scale,
            title=title,
            device=problem.device,
            labels=source.labels_among(train),
        )
        lines += [{"stage": stage.name, "test": spec} | record for record in records]
        results[spec] = accuracy_of(records, before="zero_shot", after="adapted")
    return results, lines
