"""Full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C): a linear classifier replaces the text encoder.

RAda trains adapter and classifier over frozen encoders with the mask penalty (Eq. 14); RAda-FT goes on from its weights
after a few epochs and trains everything without it (Eq. 15).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from rada_fast.config import FullConfig
from rada_fast.data.sources import FeatureFile, ImageFolder
from rada_fast.data.views import image_seed
from rada_fast.errors import UserError
from rada_fast.loops import problem
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.progress import progress
from rada_fast.loops.report import accuracy_of, finish
from rada_fast.loops.run_folder import RunFolder, reset_peak_memory
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.modules import save_adapter
from rada_fast.modules.rational_classifier import RationalClassifier

EPOCHS, IMAGES = "epochs.jsonl", "images.jsonl"
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


def run_full(config: FullConfig) -> dict[str, Any]:
    """Train both stages and test after each; returns the summary that it also writes.

    Raises UserError naming an option that cannot be used.
    """
    train = problem.open_data(config.train)
    tests = {spec: problem.open_data(spec) for spec in config.test}
    stages = [Stage("rada", config.epochs, config.lr, config.penalty_weight, trains_encoder=False)]
    if config.stages == "both":
        if not all(isinstance(source, ImageFolder) for source in (train, *tests.values())):
            raise UserError("stages both trains the image encoder and needs images; with feature files give rada")
        stages.append(Stage("rada-ft", config.finetune_epochs, config.finetune_lr, 0.0, trains_encoder=True))

    needed = problem.needs_model(config.text, train, *tests.values())
    vlm = problem.load_vision_language(config.model, config.run) if needed else None
    names = problem.class_names_of(train, config.text)
    check_classes(config, train, tests)
    features = None
    if isinstance(train, FeatureFile) or config.train_views == "center" or config.text.text_features == "class-means":
        features = problem.features_of(train, vlm, title="encode training images", run=config.run)
    text_features = problem.text_features_of(config.text, names, vlm, features)
    if features is not None:
        problem.check_width(features.features, text_features, config.train)
    logit_scale = vlm.logit_scale if vlm is not None else problem.DEFAULT_LOGIT_SCALE
    adapter = problem.make_adapter(config.adapter, text_features.shape[1], config.run.seed)
    folder = RunFolder(config.run, problem.identity_of("fft", config, vlm, adapter, text_features))

    device = problem.resolve_device(config.model.device)
    model = RationalClassifier(text_features, adapter, logit_scale).to(device)
    batches = Batches(config, train, vlm, features)
    reset_peak_memory()
    start = time.perf_counter()
    folder.remove(IMAGES)
    results: dict[str, Any] = {"training_images": len(batches), "classes": len(names)}
    resumed = 0
    for stage in stages:
        resumed += train_stage(stage, model, vlm, batches, config, folder)
        save_weights(stage, model, vlm, folder)
        results[stage.name] = test_stage(stage, model, vlm, train, tests, text_features, config, folder)
    seconds = time.perf_counter() - start
    results["time"] = {"seconds": round(seconds, 3)}
    return finish(folder, "fft", config, adapter, vlm, results, resumed=resumed)


def check_classes(config: FullConfig, train: problem.Source, tests: dict[str, problem.Source]) -> None:
    """Raise UserError where a test set has classes that were not trained."""
    for spec, source in tests.items():
        if isinstance(train, ImageFolder) and isinstance(source, ImageFolder):
            if unknown := sorted(set(source.folders) - set(train.folders)):
                raise UserError(f"test {spec} has class folders that train {config.train} lacks: {unknown[:6]}")
        elif isinstance(train, FeatureFile) and isinstance(source, FeatureFile):
            if int(source.labels.max()) > int(train.labels.max()):
                raise UserError(f"test {spec} has label {int(source.labels.max())}, train ends at {train.labels.max()}")
        else:
            raise UserError(f"test {spec} must be of train's kind: both imagefolder or both features")


class Batches:
    """Training batches: (features or images, labels), in an order drawn from (seed, stage, epoch)."""

    def __init__(
        self,
        config: FullConfig,
        train: problem.Source,
        vlm: VisionLanguageModel | None,
        features: problem.Features | None,
    ) -> None:
        self.config = config
        self.vlm = vlm
        self.features = features
        self.samples = problem.spread_limit(train.samples, config.run.limit) if isinstance(train, ImageFolder) else ()

    def __len__(self) -> int:
        return len(self.samples) if self.samples else len(self.features.labels) if self.features else 0

    def order(self, stage: Stage, epoch: int) -> list[Tensor]:
        """Indices of each step's images."""
        seed = image_seed(self.config.run.seed, f"{stage.name} epoch {epoch}")
        return list(
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).split(self.config.batch_size)
        )

    def epoch(self, stage: Stage, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Steps of an epoch. For the encoder's training, images (B, 3, S, S); else unit-norm features (B, D)."""
        fixed = self.features is not None and not stage.trains_encoder
        if fixed and (not self.samples or self.config.train_views == "center"):
            assert self.features is not None
            for step in self.order(stage, epoch):
                yield self.features.features[step], self.features.labels[step]
            return
        vlm = self.vlm
        assert vlm is not None
        seed = image_seed(self.config.run.seed, f"{stage.name} views {epoch}")
        for step in self.order(stage, epoch):
            samples = [self.samples[index] for index in step.tolist()]
            images, labels = [], []
            crops = self.config.train_views == "crop"
            stream = problem.iterate_views(
                samples,
                vlm,
                views=0 if crops else 1,
                kind="crop",
                seed=seed,
                workers=self.config.run.workers,
                crop_scale=TRAIN_CROP_SCALE,
            )
            for index, view, _ in stream:
                if view is not None:
                    images.append(view[0])
                    labels.append(samples[index].label)
            if images:
                yield torch.stack(images), torch.tensor(labels)


def learning_rate(stage: Stage, config: FullConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero. step: from 0; total: the stage's steps."""
    warmup = min(config.warmup_steps, total // 5)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    return 0.5 * stage.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_stage(
    stage: Stage,
    model: RationalClassifier,
    vlm: VisionLanguageModel | None,
    batches: Batches,
    config: FullConfig,
    folder: RunFolder,
) -> int:
    """Train one stage, or what is left of it; a line and a saved state after every epoch.

    Returns how many epochs an earlier run had finished.
    """
    trained = nn.ModuleList([model])
    if stage.trains_encoder:
        assert vlm is not None
        start_from = folder.load_state(f"rada-epoch-{config.finetune_from}.pt")
        assert start_from is not None
        model.load_state_dict(start_from["model"])
        trained.append(vlm.model.visual)
        vlm.model.visual.requires_grad_(True).train()
    optimizer = AdamW(trained.parameters(), lr=stage.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(enabled=stage.trains_encoder and config.model.precision == "float16")

    state = folder.load_state(f"{stage.name}.pt")
    first = 0
    if state is not None:
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["epoch"])
    steps = len(batches.order(stage, 0))
    device = model.weight.device
    with progress(f"full fine-tuning, {stage.name}", (stage.epochs - first) * steps) as advance:
        for epoch in range(first, stage.epochs):
            start = time.perf_counter()
            sums, seen = torch.zeros(4, device=device), 0
            for step, (inputs, labels) in enumerate(batches.epoch(stage, epoch)):
                rate = learning_rate(stage, config, epoch * steps + step, stage.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                part = config.micro_batch or len(labels)
                for micro, target in zip(inputs.split(part), labels.to(device).split(part), strict=True):
                    loss, values = losses(stage, model, vlm, micro.to(device), target, config)
                    share = len(target) / len(labels)
                    scaler.scale(loss * share).backward()
                    sums += values * len(target)
                scaler.step(optimizer)
                scaler.update()
                seen += len(labels)
                advance()
            record = epoch_record(stage, epoch, rate, sums, seen, time.perf_counter() - start)
            folder.save_state(
                f"{stage.name}.pt",
                {"epoch": epoch + 1, "trained": trained.state_dict(), "optimizer": optimizer.state_dict()},
            )
            if not stage.trains_encoder and epoch + 1 == config.finetune_from:
                folder.save_state(f"rada-epoch-{epoch + 1}.pt", {"model": model.state_dict()})
            folder.append(EPOCHS, record)
    if stage.trains_encoder:
        assert vlm is not None
        vlm.model.visual.requires_grad_(False).eval()
    return first


def losses(
    stage: Stage,
    model: RationalClassifier,
    vlm: VisionLanguageModel | None,
    inputs: Tensor,
    target: Tensor,
    config: FullConfig,
) -> tuple[Tensor, Tensor]:
    """The stage's loss, and (loss, cross-entropy, penalty, accuracy) as one detached tensor (4,)."""
    if inputs.ndim == 4:
        assert vlm is not None
        encode = vlm.image_features_with_grad if stage.trains_encoder else vlm.encode_images
        inputs = encode(inputs)
    logits, penalty = model(inputs, config.penalty)
    entropy = cross_entropy(logits, target)
    loss = entropy + stage.penalty_weight * penalty if stage.penalty_weight else entropy
    accuracy = (logits.argmax(dim=-1) == target).float().mean()
    return loss, torch.stack([part.detach() for part in (loss, entropy, penalty, accuracy)])


def epoch_record(stage: Stage, epoch: int, rate: float, sums: Tensor, seen: int, seconds: float) -> dict[str, Any]:
    """An epoch's line. Raises UserError where the loss is no number."""
    loss, entropy, penalty, accuracy = (sums / max(seen, 1)).tolist()
    if not math.isfinite(loss):
        raise UserError(f"lr {stage.lr} made the loss {loss} in epoch {epoch + 1} of {stage.name}: give a smaller one")
    return {
        "stage": stage.name,
        "epoch": epoch + 1,
        "lr": rate,
        "loss": round(loss, 6),
        "cross_entropy": round(entropy, 6),
        "penalty": round(penalty, 8),
        "train_top1": round(100 * accuracy, 3),
        "images_per_second": round(seen / seconds, 3),
        "seconds": round(seconds, 3),
    }


def save_weights(stage: Stage, model: RationalClassifier, vlm: VisionLanguageModel | None, folder: RunFolder) -> None:
    """The stage's adapter, classifier and, where it was trained, image encoder, as safetensors."""
    save_adapter(model.adapter, folder.path / f"{stage.name}-adapter.safetensors")
    tensors = {"classifier.weight": model.weight.detach().cpu().contiguous()}
    if stage.trains_encoder:
        assert vlm is not None
        visual = vlm.model.visual.state_dict()
        tensors |= {f"visual.{name}": tensor.cpu().contiguous() for name, tensor in visual.items()}
    save_file(tensors, folder.path / f"{stage.name}-model.safetensors")


def test_stage(
    stage: Stage,
    model: RationalClassifier,
    vlm: VisionLanguageModel | None,
    train: problem.Source,
    tests: dict[str, problem.Source],
    text_features: Tensor,
    config: FullConfig,
    folder: RunFolder,
) -> dict[str, Any]:
    """Accuracies on every test set, of the zero-shot model and after this stage.

    A set with some of the training classes, as ImageNet-A's 200, is judged among those.
    """

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model.adapter(images, model.weight, model.logit_scale)
        return logits

    results = {}
    for spec, source in tests.items():
        title = f"test {spec} after {stage.name}"
        features = problem.features_of(source, vlm, title=title, run=config.run, cached=not stage.trains_encoder)
        problem.check_width(features.features, text_features, spec)
        labels = None
        if isinstance(source, ImageFolder) and isinstance(train, ImageFolder) and source.folders != train.folders:
            labels = [train.folders.index(name) for name in source.folders]
        records = evaluate(
            predict,
            features,
            text_features,
            model.logit_scale,
            title=title,
            device=model.weight.device,
            labels=labels,
        )
        for record in records:
            folder.append(IMAGES, {"stage": stage.name, "test": spec} | record)
        results[spec] = accuracy_of(records, before="zero_shot", after="adapted")
    return results
