"""Efficient fine-tuning (RAda, arXiv:2507.15480, Sec. 4.2): train the adapter with frozen encoders, test base and new.

Features are computed once when the training views are fixed, and once an epoch when they are drawn anew.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from rada_fast.config import EfficientConfig
from rada_fast.data.sources import ImageFolder, base_and_new
from rada_fast.data.views import image_seed
from rada_fast.errors import UserError
from rada_fast.loops import problem
from rada_fast.loops.episodes import make_optimizer
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.problem import Features
from rada_fast.loops.progress import progress
from rada_fast.loops.report import accuracy_of, finish, harmonic_mean
from rada_fast.loops.run_folder import RunFolder, reset_peak_memory
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.modules import RationalAdapter, save_adapter

EPOCHS, IMAGES, STATE = "epochs.jsonl", "images.jsonl", "state.pt"
WARMUP_LR = 1e-5
"""The published configurations' learning rate of the one warm-up epoch."""
MOMENTUM = 0.9
"""Of SGD, as in the published configurations."""


@dataclass(frozen=True)
class TestSet:
    """Images to test on, with the text features of their classes."""

    name: str
    images: Features
    text_features: Tensor  # (K, D)

    __test__ = False


def run_efficient(config: EfficientConfig) -> dict[str, Any]:
    """Train and test; returns the summary that it also writes.

    Raises UserError naming an option that cannot be used.
    """
    sources = {"train": problem.open_data(config.train), "test": problem.open_data(config.test)}
    if config.new_test is not None:
        sources["new"] = problem.open_data(config.new_test)
    needed = problem.needs_model(config.text, *sources.values())
    vlm = problem.load_vision_language(config.model, config.run) if needed else None
    logit_scale = vlm.logit_scale if vlm is not None else problem.DEFAULT_LOGIT_SCALE

    train, text_features, tests, training_source = prepare(config, sources, vlm)
    problem.check_width(train.features, text_features, config.train)
    adapter = problem.make_adapter(config.adapter, text_features.shape[1], config.run.seed)
    folder = RunFolder(config.run, problem.identity_of("eft", config, vlm, adapter, text_features))

    device = problem.resolve_device(config.model.device)
    adapter.to(device)
    reset_peak_memory()
    start = time.perf_counter()
    optimizer = make_optimizer(
        adapter.parameters(), config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=MOMENTUM
    )
    first = resume(folder, adapter, optimizer)
    with progress("efficient fine-tuning", config.epochs - first) as advance:
        for epoch in range(first, config.epochs):
            if config.train_views == "crop":
                assert vlm is not None
                assert isinstance(training_source, ImageFolder)
                train = encode_crops(training_source, vlm, config, epoch)
            record = train_epoch(adapter, optimizer, train, text_features, logit_scale, config, epoch)
            if config.evaluate_every and (epoch + 1) % config.evaluate_every == 0:
                for test in tests:
                    records = test_records(adapter, test, logit_scale)
                    record[f"{test.name}_top1"] = accuracy_of(records, before="zero_shot", after="adapted")[
                        "adapted_top1"
                    ]
            folder.save_state(
                STATE, {"epoch": epoch + 1, "adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}
            )
            folder.append(EPOCHS, record)
            advance(note=f"loss {record['loss']:.4f}")
    training_seconds = time.perf_counter() - start
    save_adapter(adapter, folder.path / "adapter.safetensors")

    folder.remove(IMAGES)
    results: dict[str, Any] = {"training_images": len(train.labels), "classes": len(text_features)}
    for test in tests:
        records = test_records(adapter, test, logit_scale)
        for line in records:
            folder.append(IMAGES, {"split": test.name} | line)
        results[test.name] = {"classes": len(test.text_features)}
        results[test.name] |= accuracy_of(records, before="zero_shot", after="adapted")
    if {"base", "new"} <= set(results):
        for name in ("zero_shot", "adapted"):
            results[f"{name}_harmonic_mean"] = harmonic_mean(
                results["base"][f"{name}_top1"], results["new"][f"{name}_top1"]
            )
    results["unreadable"] = len(train.unreadable)
    seen = (config.epochs - first) * len(train.labels)
    results["time"] = {
        "seconds": round(time.perf_counter() - start, 3),
        "training_seconds": round(training_seconds, 3),
        "images_per_second": round(seen / training_seconds, 3),
    }
    return finish(folder, "eft", config, adapter, vlm, results, resumed=first)


def prepare(
    config: EfficientConfig, sources: dict[str, problem.Source], vlm: VisionLanguageModel | None
) -> tuple[Features, Tensor, list[TestSet], problem.Source]:
    """Training features, their classes' text features, the test sets, and the few-shot training source."""
    training, testing = sources["train"], sources["test"]
    names = problem.class_names_of(training, config.text)
    if config.protocol == "base-to-new":
        base, new = base_and_new(len(names))
        if not new:
            raise UserError(f"protocol base-to-new needs at least two classes, {config.train} has {len(names)}")
    else:
        base, new = list(range(len(names))), []

    few = training.subset(base)
    few = few if config.shots is None else few.few_shot(config.shots, config.run.seed)
    if config.train_views == "crop" and not isinstance(few, ImageFolder):
        raise UserError(f"train_views crop needs images, {config.train} holds features")
    run = config.run
    # A limit is for the test images: the number of shots already bounds the training images.
    train = problem.features_of(few, vlm, title="encode training images", run=replace(run, limit=None))

    def text_of(labels: list[int], features: Features | None) -> Tensor:
        return problem.text_features_of(config.text, [names[label] for label in labels], vlm, features)

    by_file = config.text.text_features is not None and config.text.text_features != "class-means"
    if by_file:
        # A file of text features has a row for every class of the training data.
        every = problem.text_features_of(config.text, names, vlm, None)
        text_base, text_new = every[base], every[new]
    else:
        text_base = text_of(base, train)
        text_new = torch.empty(0)
        if new:
            rest = training.subset(new)
            means = config.text.text_features == "class-means"
            rest_features = (
                problem.features_of(rest, vlm, title="encode new classes", run=replace(run, limit=None))
                if means
                else None
            )
            text_new = text_of(new, rest_features)

    def test_set(name: str, source: problem.Source, text: Tensor) -> TestSet:
        features = problem.features_of(source, vlm, title=f"encode {name} test images", run=run)
        problem.check_width(features.features, text, name)
        if len(features.labels) and int(features.labels.max()) >= len(text):
            raise UserError(
                f"test images of {name} have label {int(features.labels.max())}, but there are {len(text)} classes"
            )
        return TestSet(name, features, text)

    check_same_classes(training, testing, config)
    if config.protocol == "base-to-new":
        tests = [
            test_set("base", testing.subset(base), text_base),
            test_set("new", testing.subset(new), text_new),
        ]
    else:
        tests = [test_set("base" if "new" in sources else "test", testing, text_base)]
        if "new" in sources:
            new_names = problem.class_names_of(sources["new"], config.text)
            if config.text.text_features is None:
                new_text = problem.text_features_of(config.text, new_names, vlm, None)
            else:
                # With no prompts, the new classes are described by their own images' means.
                described = problem.features_of(sources["new"], vlm, title="encode new classes", run=run)
                new_text = problem.class_means(described, len(new_names))
            tests.append(test_set("new", sources["new"], new_text))
    return train, text_base, tests, few


def check_same_classes(training: problem.Source, testing: problem.Source, config: EfficientConfig) -> None:
    """Raise UserError where training and test folders are not the same classes."""
    if isinstance(training, ImageFolder) and isinstance(testing, ImageFolder) and training.folders != testing.folders:
        odd = sorted(set(training.folders) ^ set(testing.folders))
        raise UserError(
            f"test {config.test} must have the class folders of train {config.train}; only in one of them: "
            f"{', '.join(odd[:6])}"
        )


def resume(folder: RunFolder, adapter: RationalAdapter, optimizer: Optimizer) -> int:
    """Take up what the folder holds of this run; returns the number of finished epochs."""
    state = folder.load_state(STATE)
    if state is None:
        folder.remove(EPOCHS)
        return 0
    adapter.load_state_dict(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    # A crash between the state and its line leaves one line too few or none too many: the state decides.
    lines = folder.read_lines(EPOCHS)[: state["epoch"]]
    folder.remove(EPOCHS)
    for line in lines:
        folder.append(EPOCHS, line)
    return int(state["epoch"])


def learning_rate(config: EfficientConfig, epoch: int) -> float:
    """The rate of an epoch, counted from 0: one warm-up epoch, then a cosine to zero over all epochs."""
    if config.schedule == "constant" or config.epochs == 1:
        return config.lr
    if epoch == 0:
        return min(WARMUP_LR, config.lr)
    return 0.5 * config.lr * (1 + math.cos(math.pi * epoch / config.epochs))


def train_epoch(
    adapter: RationalAdapter,
    optimizer: Optimizer,
    train: Features,
    text_features: Tensor,
    logit_scale: float,
    config: EfficientConfig,
    epoch: int,
) -> dict[str, Any]:
    """One pass over the training features, in an order drawn from (seed, epoch); returns the epoch's record."""
    start = time.perf_counter()
    device = next(adapter.parameters()).device
    features, labels = train.features.to(device), train.labels.to(device)
    text_features = text_features.to(device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    generator = torch.Generator().manual_seed(image_seed(config.run.seed, f"epoch {epoch}"))
    order = torch.randperm(len(labels), generator=generator)

    # Sums stay on the device and are read once an epoch: loss, cross-entropy, penalty, right answers.
    sums = torch.zeros(4, device=device)
    for batch in order.split(config.batch_size):
        batch = batch.to(device)
        target = labels[batch]
        logits, penalty = adapter(features[batch], text_features, logit_scale, penalty=config.penalty)
        entropy = cross_entropy(logits, target)
        loss = entropy + config.penalty_weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == target).sum()
            sums += torch.stack([part.detach() for part in (loss, entropy, penalty)] + [right / len(batch)]) * len(
                batch
            )
    loss_mean, entropy_mean, penalty_mean, accuracy = (sums / len(labels)).tolist()
    if not math.isfinite(loss_mean):
        raise UserError(f"lr {config.lr} made the loss {loss_mean} in epoch {epoch + 1}: give a smaller one")
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(config, epoch),
        "loss": round(loss_mean, 6),
        "cross_entropy": round(entropy_mean, 6),
        "penalty": round(penalty_mean, 8),
        "train_top1": round(100 * accuracy, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }


def encode_crops(source: ImageFolder, vlm: VisionLanguageModel, config: EfficientConfig, epoch: int) -> Features:
    """Features of one random crop an image, drawn from (seed, epoch, image id)."""
    seed = image_seed(config.run.seed, f"epoch {epoch}")
    features, kept = [], []
    stream = problem.iterate_views(source.samples, vlm, views=0, kind="crop", seed=seed, workers=config.run.workers)
    with progress(f"encode epoch {epoch + 1}", len(source.samples)) as advance:
        for index, views, _ in stream:
            if views is not None:
                features.append(vlm.encode_images(views).cpu())
                kept.append(source.samples[index])
            advance()
    labels = torch.tensor([sample.label for sample in kept])
    return Features(torch.cat(features), labels, tuple(sample.id for sample in kept))


def test_records(adapter: RationalAdapter, test: TestSet, logit_scale: float) -> list[dict[str, Any]]:
    """One record an image of a test set, with the zero-shot and the adapted answer."""
    device = next(adapter.parameters()).device
    text_features = test.text_features.to(device)

    def predict(images: Tensor) -> Tensor:
        return adapter(images, text_features, logit_scale)

    return evaluate(predict, test.images, text_features, logit_scale, title=f"test {test.name}", device=device)
