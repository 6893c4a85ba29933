"""Efficient fine-tuning (RAda, arXiv:2507.15480, Sec. 4.2): train the adapter with frozen encoders, then evaluate it.

Features are computed once if the training views are fixed, and once in each epoch if the views are drawn anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rada_fast.config.commands import EFTOptions
from rada_fast.config.methods import EFT_METHODS
from rada_fast.data.few_shot import base_and_new
from rada_fast.data.sources import Source
from rada_fast.engine.efficient_training import TunedEncoders, efficient_plan, efficient_step
from rada_fast.engine.training import training_time
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import EvaluationData, EvaluationSet, encode_evaluation, evaluate_sets, tuned_sets
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.training import Training, train
from rada_fast.loops.zero_shot import check_answers
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.image_features import Features, features_of
from rada_fast.models.prompts import resolve_prompts
from rada_fast.models.trained_method import ADAPTER_FILE, METHOD_FILE, MethodConfig
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.modules import RationalAdapter
from rada_fast.reports.summary import accuracy_of, already_finished, finish, harmonic_mean, unreadable_records
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.machine import reset_peak_memory

IMAGES, STATE = "images.jsonl", "state.pt"


@dataclass(frozen=True)
class Task:
    """Everything that a run of eft works on.

    setup: the set-up of the run, with the classes that are trained.
    images: the few-shot training images.
    features: the features of the centre views of these images.
    evaluation: the data to evaluate on at the end.
    read: all data that the run reads, by part ("train", "test", ...).
    names: the names of all classes, including those that are only evaluated.
    text: the text features of all these classes.
    tuning: what is trained inside the encoders, or None.
    """

    setup: Setup
    images: Source
    features: Features
    evaluation: tuple[EvaluationData, ...]
    read: dict[str, Source]
    names: tuple[str, ...]
    text: Tensor
    tuning: EncoderTuning | None = None


def run_eft(options: EFTOptions) -> dict[str, Any]:
    """Train the adapter, evaluate it, and write the summary. Returns the summary.

    Raises UserError naming an option that cannot be used.
    """
    task = open_task(options)
    setup = task.setup
    # The training images decide the adapter. The images of the evaluation decide a number before the end only if
    # epochs are evaluated too.
    deciding = {part for part in task.read if options.evaluate_every or part.startswith("train")}
    limit = options.run.limit
    with open_folder(
        setup,
        task.read,
        deciding=deciding,
        names=task.names,
        text=task.text,
        limit=limit if options.evaluate_every else None,
    ) as folder:
        scope = {"limit": limit}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=options.epochs)
        reset_peak_memory()
        start = time.perf_counter()
        sets = encode_evaluation(task.evaluation, setup)
        for one, data in zip(sets, task.evaluation, strict=True):
            check_answers(one.images, one.text, data.names, f"test images of {one.name}", setup)
        training, resumed = train_adapter(task, options, sets, folder)
        folder.accept_inputs()
        save_weights(task, options, folder)
        records = evaluate_sets(sets, setup, folder, tuned_sets(sets, task.evaluation, setup, task.tuning))
        results: dict[str, Any] = {"training_images": len(task.images.ids), "classes": len(setup.names)}
        results |= results_of(records, sets, training, task, folder)
        results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(training.records)}
        return finish(folder, setup.facts(), results, scope=scope, resumed=resumed)


def open_task(options: EFTOptions) -> Task:
    """Open the data, the model and the other files that the options name.

    Raises UserError naming an option that cannot be used.
    """
    specs = {"train": options.train, "test": options.test}
    specs |= {} if options.new_test is None else {"new": options.new_test}
    others = {f"evaluate-on {spec}": spec for spec in options.evaluate_on}
    specs |= others
    only_images = None
    if (kind := EFT_METHODS[options.method].tuning) is not None:
        if options.text.text_features is not None:
            raise UserError(f"method {options.method} trains with prompts: leave out --text-features")
        if kind != "context":
            only_images = f"method {options.method} trains inside the image encoder and needs images"
    opened = open_data_and_model(options, specs, only_images=only_images)
    source, testing, new_testing = opened.sources["train"], opened.sources["test"], opened.sources.get("new")
    prompts, means = options.text.text_features is None, options.text.text_features == "class-means"

    names = {
        part: class_names_of(data, options.text.classes, prompts=prompts)
        for part, data in opened.sources.items()
        if part != "test"
    }
    count = len(names["train"])
    base, new = base_and_new(count) if options.protocol == "base-to-new" else (list(range(count)), [])
    if options.protocol == "base-to-new" and not new:
        raise UserError(f"protocol base-to-new needs at least two classes, {options.train} has {count}")
    if (difference := testing.class_difference(source)) is not None:
        raise UserError(f"test {options.test} must have the classes of train {options.train}: {difference}")

    halves = {"": base} if not new else {"base ": base, "new ": new}
    for half, labels in halves.items():
        if new_testing is None and not testing.subset(labels).ids:
            raise UserError(f"test {options.test} has no image of the {half}classes")
    images, new_images = source.subset(base), source.subset(new)
    if not images.ids:
        raise UserError(f"train {options.train} has no image of the base classes")
    images = images if options.shots is None else images.few_shot(options.shots, options.run.seed)
    if options.train_views == "crop" and not images.holds_images:
        raise UserError(f"train_views crop needs images, {options.train} holds features")
    # The option --limit applies to the images of the evaluation; --shots already limits the training images.
    encoded = {"training images": images} | ({"new classes": new_images} if new and means else {})
    features = {
        title: features_of(data, opened.model, title=f"encode {title}", workers=options.run.workers)
        for title, data in encoded.items()
    }

    groups = {"base": ClassGroup([names["train"][label] for label in base], features["training images"], options.train)}
    if new:
        groups["new"] = ClassGroup([names["train"][label] for label in new], features.get("new classes"), options.train)
    elif new_testing is not None and prompts:
        groups["new"] = ClassGroup(names["new"], data=options.new_test)
    groups |= {part: ClassGroup(names[part], data=spec) for part, spec in others.items()}
    rows = text_features(options.text, list(groups.values()), opened.model, opened.text_file)
    texts = dict(zip(groups, rows, strict=True))
    setup = open_setup("eft", options, opened, groups["base"].names, texts["base"])

    if options.protocol == "base-to-new":
        evaluation = [
            EvaluationData("base", testing.subset(base), texts["base"], groups["base"].names),
            EvaluationData("new", testing.subset(new), texts["new"], groups["new"].names),
        ]
    else:
        evaluation = [EvaluationData("test" if new_testing is None else "base", testing, texts["base"], names["train"])]
        if new_testing is not None:
            evaluation.append(EvaluationData("new", new_testing, texts.get("new"), names["new"]))
    evaluation += [
        EvaluationData(spec, opened.sources[part], texts[part], names[part]) for part, spec in others.items()
    ]
    return Task(
        setup,
        images,
        features["training images"],
        tuple(evaluation),
        {**opened.sources, "train": images} | ({"train, new classes": new_images} if new and means else {}),
        tuple(name for found in names.values() for name in found),
        torch.cat([texts["base"], texts["new"]]) if new else texts["base"],
        open_tuning(options, setup),
    )


def open_tuning(options: EFTOptions, setup: Setup) -> EncoderTuning | None:
    """Make what the method trains inside the encoders. Returns None if it trains nothing there.

    Raises UserError if there is more than one prompt for a class, or an encoder has no blocks.
    """
    kind = EFT_METHODS[options.method].tuning
    if kind is None:
        return None
    prompts = resolve_prompts(options.text.templates, options.train)
    if len(prompts.templates) != 1 or prompts.descriptions:
        raise UserError(f"templates must be a single one with method {options.method}, got {options.text.templates}")
    return EncoderTuning(kind, setup.model.loaded(), prompts.templates[0], options.tuning, options.run.seed)


def train_adapter(
    task: Task, options: EFTOptions, sets: list[EvaluationSet], folder: RunFolder
) -> tuple[Training, int]:
    """Train the adapter for the epochs that no earlier run has finished.

    Returns the training, and the number of epochs that an earlier run had finished.
    """
    setup, tuning, tuned = task.setup, task.tuning, None
    if tuning is not None:
        tuned = TunedEncoders(tuning, setup.model.loaded(), tuning.tokens_of(setup.names))
    step = efficient_step(setup.head, setup.text, setup.logit_scale, options, tuned)
    trained = setup.head if tuning is None else nn.ModuleList([setup.head, tuning])
    training = Training(folder, STATE, trained, step.optimizer, step.scaler, group=step.group)

    def evaluates(epoch: int) -> bool:
        return options.evaluate_every > 0 and (epoch + 1) % options.evaluate_every == 0

    def after_epoch(epoch: int, record: dict[str, Any]) -> None:
        if evaluates(epoch):
            after = tuned_sets(sets, task.evaluation, setup, tuning)
            for name, records in evaluate_sets(sets, setup, folder, after).items():
                record[f"{name}_top1"] = accuracy_of(records, before="zero_shot", after="adapted")["adapted_top1"]

    plan = efficient_plan(
        options, task.images, task.features, setup.model, setup.device, training.note_unreadable, tuned
    )
    resumed = train(
        training, step, plan, title="efficient fine-tuning", save_every=options.save_every,
        profile=options.run.profile, after_epoch=after_epoch,
        evaluates=evaluates,
    )  # fmt: skip
    return training, resumed


def save_weights(task: Task, options: EFTOptions, folder: RunFolder) -> None:
    """Write what was trained: a rational adapter as its own file, and everything else that a method has."""
    setup, tuning = task.setup, task.tuning
    head, tensors = setup.head, {}
    if isinstance(head, RationalAdapter):
        folder.save_adapter(ADAPTER_FILE, head)
    else:
        tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    if tuning is not None:
        tensors |= {f"encoders.{name}": tensor for name, tensor in tuning.state_dict().items()}
    if tensors:
        config = MethodConfig(
            "eft",
            options.method,
            options.model.model if isinstance(setup.model, VisionLanguageModel) else None,
            setup.text.shape[1],
            setup.adapter.config.num_heads,
            options.tuning.feature_ratio,
            None if tuning is None else tuning.template,
            None if tuning is None else options.tuning,
        )
        folder.save_tensors(METHOD_FILE, tensors, config.metadata())


def results_of(
    records: dict[str, list[dict[str, Any]]],
    sets: list[EvaluationSet],
    training: Training,
    task: Task,
    folder: RunFolder,
) -> dict[str, Any]:
    """Compute the results on every evaluation set, and write images.jsonl.

    records: the records of each evaluation set, by its name.
    sets: the evaluation sets.
    training: the finished training, which knows the training images that could not be read.
    task: the data and the set-up of the run.
    folder: the folder of the run.
    """
    results: dict[str, Any] = {}
    unreadable = unreadable_records(training.unreadable.values(), task.setup.names)
    lines = [{"split": "train"} | record for record in unreadable]
    for one in sets:
        lines += [{"split": one.name} | record for record in records[one.name]]
        accuracy = accuracy_of(records[one.name], before="zero_shot", after="adapted")
        results[one.name] = {"classes": len(one.text)} | accuracy
    folder.write_lines(IMAGES, lines)
    if {"base", "new"} <= set(results):
        for name in ("zero_shot", "adapted"):
            results[f"{name}_harmonic_mean"] = harmonic_mean(
                results["base"][f"{name}_top1"], results["new"][f"{name}_top1"]
            )
    results["unreadable"] = sum(line["status"] == "unreadable" for line in lines)
    return results
