"""Efficient fine-tuning (RAda, arXiv:2507.15480, Sec. 4.2): train the adapter with frozen encoders, test base and new.

Features are computed once when the training views are fixed, and once an epoch when they are drawn anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.commands import EFTOptions
from rada_fast.data.sources import Source, base_and_new
from rada_fast.data.views import image_seed
from rada_fast.engine.episodes import make_optimizer
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import evaluate, unreadable_records
from rada_fast.loops.features import Features, class_means, encode_crops
from rada_fast.loops.setup import Problem, Setup, open_setup, open_sources
from rada_fast.loops.training import (
    Batch,
    Training,
    shuffled,
    step_loss,
    train_epoch,
    training_time,
    warm_up_then_cosine,
)
from rada_fast.modules import RationalAdapter
from rada_fast.reports.summary import accuracy_of, already_finished, finish, harmonic_mean
from rada_fast.runs.folder import RunFolder, reset_peak_memory
from rada_fast.runs.identity import open_folder
from rada_fast.runs.progress import progress

IMAGES, STATE = "images.jsonl", "state.pt"
WARMUP_LR = 1e-5
"""The published configurations' learning rate of the one warm-up epoch."""
MOMENTUM = 0.9
"""Of SGD, as in the published configurations."""


@dataclass(frozen=True)
class TestSet:
    """Images to test on, with the text features of their classes."""

    name: str
    images: Features
    text_features: Tensor  # (K, D), on the CPU

    __test__ = False


@dataclass(frozen=True)
class TrainingSet:
    """The few-shot training images, the features of their centre views, and the classes they are of."""

    source: Source
    features: Features
    names: tuple[str, ...]
    base: list[int]  # labels of the trained classes among all, and of those kept for the test
    new: list[int]


def run_eft(config: EFTOptions) -> dict[str, Any]:
    """Train and test; returns the summary that it also writes.

    Raises UserError naming an option that cannot be used.
    """
    specs = {"train": config.train, "test": config.test}
    specs |= {} if config.new_test is None else {"new": config.new_test}
    setup = open_setup(config, open_sources(specs))
    train = training_set(setup, config)
    text_base, text_new = class_texts(setup, train, config)
    problem = setup.problem([train.names[label] for label in train.base], text_base)
    problem.check_width(train.features.features.shape[-1], f"--train {config.train}")
    # Before anything is encoded, trained or written; pictures have the model's width.
    for option, part in (("--test", "test"), ("--new-test", "new")):
        if part in specs:
            problem.check_width(setup.sources[part].width, f"{option} {specs[part]}")
    with open_run_folder(problem, train, text_base, text_new, config) as folder:
        covers = {"limit": config.run.limit}
        if (summary := folder.finished(covers)) is not None:
            return already_finished(folder, summary, resumed=config.epochs)
        reset_peak_memory()
        start = time.perf_counter()
        tests = list(test_sets(setup, train, text_base, text_new, config))
        training, resumed = train_adapter(problem, train, tests, config, folder)
        folder.accept_inputs()
        folder.save_adapter("adapter.safetensors", problem.adapter)
        results = test_all(problem, train, tests, training, folder)
        results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(training.records)}
        return finish(folder, "eft", problem, results, covers=covers, resumed=resumed)


def open_run_folder(
    problem: Problem, train: TrainingSet, text_base: Tensor, text_new: Tensor, config: EFTOptions
) -> RunFolder:
    """The run's folder: training images decide the adapter, and test images only where epochs are tested too."""
    read = {part: source for part, source in problem.sources.items() if part != "train"} | {"train": train.source}
    deciding = set(read) if config.evaluate_every else {"train"}
    if train.new and config.text.text_features == "class-means":
        read["train, new classes"] = problem.sources["train"].subset(train.new)
        deciding.add("train, new classes")
    apart = problem.sources.get("new")
    return open_folder(
        "eft",
        problem,
        read,
        deciding=deciding,
        names=[*train.names, *(problem.class_names(apart) if apart is not None else ())],
        text=torch.cat([text_base, text_new]) if train.new else text_base,
        limit=config.run.limit if config.evaluate_every else None,
    )


def test_all(
    problem: Problem, train: TrainingSet, tests: list[TestSet], training: Training, folder: RunFolder
) -> dict[str, Any]:
    """The results on every test set; writes images.jsonl."""
    results: dict[str, Any] = {
        "training_images": len(train.source.ids),
        "classes": len(problem.names),
    }
    unreadable = list(training.unreadable.values())
    lines = [{"split": "train"} | record for record in unreadable_records(unreadable)]
    for test in tests:
        records = test_records(problem.adapter, test, problem.logit_scale)
        lines += [{"split": test.name} | record for record in records]
        results[test.name] = {"classes": len(test.text_features)}
        results[test.name] |= accuracy_of(records, before="zero_shot", after="adapted")
    folder.write_lines(IMAGES, lines)
    if {"base", "new"} <= set(results):
        for name in ("zero_shot", "adapted"):
            results[f"{name}_harmonic_mean"] = harmonic_mean(
                results["base"][f"{name}_top1"], results["new"][f"{name}_top1"]
            )
    results["unreadable"] = sum(line["status"] == "unreadable" for line in lines)
    return results


def training_set(setup: Setup, config: EFTOptions) -> TrainingSet:
    """The base classes' few-shot images and their features."""
    training = setup.sources["train"]
    names = setup.class_names(training)
    base = list(range(len(names)))
    new: list[int] = []
    if config.protocol == "base-to-new":
        base, new = base_and_new(len(names))
        if not new:
            raise UserError(f"protocol base-to-new needs at least two classes, {config.train} has {len(names)}")
    check_same_classes(training, setup.sources["test"], config)
    few = training.subset(base)
    few = few if config.shots is None else few.few_shot(config.shots, config.run.seed)
    if config.train_views == "crop" and not few.holds_images:
        raise UserError(f"train_views crop needs images, {config.train} holds features")
    # A limit is for the test images: the number of shots already bounds the training images.
    return TrainingSet(few, setup.features(few, title="encode training images"), names, base, new)


def class_texts(setup: Setup, train: TrainingSet, config: EFTOptions) -> tuple[Tensor, Tensor]:
    """Text features of the trained classes, and of those kept for the test."""
    options = config.text
    if options.text_features not in (None, "class-means"):
        # A file of text features has a row for every class of the training data.
        every = setup.text_features(train.names, None)
        return every[train.base], every[train.new]

    def text_of(labels: list[int], features: Features | None) -> Tensor:
        return setup.text_features([train.names[label] for label in labels], features)

    text_base = text_of(train.base, train.features)
    if not train.new:
        return text_base, torch.empty(0)
    rest = None
    if options.text_features == "class-means":
        rest = setup.features(setup.sources["train"].subset(train.new), title="encode new classes")
    return text_base, text_of(train.new, rest)


def test_sets(
    setup: Setup, train: TrainingSet, text_base: Tensor, text_new: Tensor, config: EFTOptions
) -> Iterator[TestSet]:
    """The test images of the trained classes and of new ones, with their classes' text features."""
    testing, limit = setup.sources["test"], config.run.limit

    def test_set(name: str, source: Source, text: Tensor) -> TestSet:
        features = setup.features(source, title=f"encode {name} test images", limit=limit)
        if len(features.labels) and int(features.labels.max()) >= len(text):
            raise UserError(
                f"test images of {name} have label {int(features.labels.max())}, but there are {len(text)} classes"
            )
        return TestSet(name, features, text)

    if config.protocol == "base-to-new":
        yield test_set("base", testing.subset(train.base), text_base)
        yield test_set("new", testing.subset(train.new), text_new)
        return
    apart = setup.sources.get("new")
    yield test_set("test" if apart is None else "base", testing, text_base)
    if apart is not None:
        new_names = setup.class_names(apart)
        if config.text.text_features is None:
            new_text = setup.text_features(new_names, None)
        else:
            # With no prompts, the new classes are described by their own images' means.
            new_text = class_means(setup.features(apart, title="encode new classes", limit=limit), len(new_names))
        yield test_set("new", apart, new_text)


def check_same_classes(training: Source, testing: Source, config: EFTOptions) -> None:
    """Raise UserError where training and test data are not of the same classes."""
    if (difference := testing.class_difference(training)) is not None:
        raise UserError(f"test {config.test} must have the classes of train {config.train}: {difference}")


def train_adapter(
    problem: Problem, train: TrainingSet, tests: list[TestSet], config: EFTOptions, folder: RunFolder
) -> tuple[Training, int]:
    """Train, or what is left of it; returns the training and how many epochs an earlier run had finished."""
    adapter = problem.adapter
    optimizer = make_optimizer(
        adapter.parameters(), config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=MOMENTUM
    )
    training = Training(folder, STATE, adapter, optimizer)
    first = training.resume()
    training.note_unreadable(train.features.unreadable)

    def loss(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits, penalty = adapter(features, problem.text, problem.logit_scale, penalty=config.penalty)
        return step_loss(logits, penalty, target, config.penalty_weight)

    with progress("efficient fine-tuning", config.epochs - first) as advance:
        for epoch in range(first, config.epochs):
            features = epoch_features(problem, train, config, epoch)
            training.note_unreadable(features.unreadable)
            rate = learning_rate(config, epoch)
            record = train_epoch(
                training,
                batches(features, config, epoch, problem.device),
                loss,
                lambda step, rate=rate: rate,  # type: ignore[misc]
                lr=config.lr,
            )
            if config.evaluate_every and (epoch + 1) % config.evaluate_every == 0:
                for test in tests:
                    records = test_records(adapter, test, problem.logit_scale)
                    accuracy = accuracy_of(records, before="zero_shot", after="adapted")
                    record[f"{test.name}_top1"] = accuracy["adapted_top1"]
            training.save(record)
            advance(note=f"loss {record['loss']:.4f}")
    return training, first


def learning_rate(config: EFTOptions, epoch: int) -> float:
    """The rate of an epoch, counted from 0: one warm-up epoch, then a cosine to zero over all epochs."""
    if config.schedule == "constant" or config.epochs == 1:
        return config.lr
    if epoch == 0:
        return min(WARMUP_LR, config.lr)
    return warm_up_then_cosine(config.lr, epoch, config.epochs, warmup=0)


def epoch_features(problem: Problem, train: TrainingSet, config: EFTOptions, epoch: int) -> Features:
    """An epoch's training features: the same centre views, or new random crops drawn from (seed, epoch, image id)."""
    if config.train_views == "center":
        return train.features
    seed = image_seed(config.run.seed, f"epoch {epoch}")
    title = f"encode epoch {epoch + 1}"
    return encode_crops(train.source.samples, problem.model, title=title, seed=seed, workers=config.run.workers)


def batches(features: Features, config: EFTOptions, epoch: int, device: torch.device) -> Iterator[Batch]:
    """An epoch's steps, in an order drawn from (seed, epoch)."""
    inputs, labels = features.features.to(device), features.labels.to(device)
    for batch in shuffled(len(labels), config.batch_size, config.run.seed, f"epoch {epoch}"):
        batch = batch.to(device)
        yield inputs[batch], labels[batch]


def test_records(adapter: RationalAdapter, test: TestSet, logit_scale: float) -> list[dict[str, Any]]:
    """One record an image of a test set, with the zero-shot and the adapted answer."""
    device = next(adapter.parameters()).device
    text_features = test.text_features.to(device)

    def predict(images: Tensor) -> Tensor:
        return adapter(images, text_features, logit_scale)

    return evaluate(predict, test.images, text_features, logit_scale, title=f"test {test.name}", device=device)
