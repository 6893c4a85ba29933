"""Full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C): a linear classifier replaces the text encoder.

The first stage, RAda, trains adapter and classifier over frozen encoders with the mask penalty (Eq. 14). The second
stage, RAda-FT, starts from the weights of the first stage after a few of its epochs and trains adapter, classifier and
image encoder without the penalty (Eq. 15). The methods that the paper compares with RAda have other stages and another
head, as their rows in config/methods.py say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rada_fast.config.commands import FFTOptions
from rada_fast.data.fingerprints import state_fingerprint
from rada_fast.data.sources import ImageFolder, Source
from rada_fast.engine.full_training import Stage, stage_plan, stage_step, stages_of
from rada_fast.engine.training import training_time
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.identity import open_folder
from rada_fast.loops.kept_records import KeptRecords
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.training import Training, train
from rada_fast.loops.zero_shot import check_sample
from rada_fast.models.class_features import ClassGroup, class_features, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.encoder_tuning import Captions, captions_of
from rada_fast.models.image_features import Features, features_of
from rada_fast.models.prompts import resolve_prompts
from rada_fast.models.trained import TEXT, VISUAL, text_state
from rada_fast.models.trained_method import MethodConfig
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.modules import RationalAdapter
from rada_fast.modules.classifier import Classifier
from rada_fast.reports.summary import accuracy_of, already_finished, finish, unreadable_records
from rada_fast.runs.folder import RunFolder
from rada_fast.runs.machine import reset_peak_memory

IMAGES = "images.jsonl"


@dataclass(frozen=True)
class Task:
    """Everything that a run of fft works on.

    setup: the set-up of the run, with the classes that are trained.
    stages: the stages of training, in their order.
    images: the training images.
    features: the features of their centre views, if a stage or the text features need them.
    evaluation: the data to evaluate on, by their KIND:PATH.
    limit: the largest number of training images, or None if all images are used.
    captions: the prompts of the classes, if a stage trains the text encoder.
    """

    setup: Setup
    stages: tuple[Stage, ...]
    images: Source
    features: Features | None
    evaluation: dict[str, Source]
    limit: int | None
    captions: Captions | None

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
        scope = {"limit": options.run.limit, "ensemble": list(options.ensemble)}
        if (summary := folder.finished_summary(scope)) is not None:
            return already_finished(folder, summary, resumed=sum(stage.epochs for stage in task.stages))
        check_sample(task.images, f"--train {options.train}", setup)
        results, resumed = train_and_evaluate(task, options, folder)
        return finish(folder, setup.facts(), results, scope=scope, resumed=resumed)


def open_task(options: FFTOptions) -> Task:
    """Open the data, the model and the other files that the options name.

    Raises UserError naming an option that cannot be used.
    """
    stages, only_images = stages_of(options), None
    if any(stage.trains_encoder for stage in stages):
        given, other = ("stages both", "first") if len(stages) > 1 else (f"method {options.method}", "lp")
        only_images = f"{given} trains the image encoder and needs images; with feature files give {other}"
    parts = {spec: f"test {spec}" for spec in options.test}
    specs = {"train": options.train, **{part: spec for spec, part in parts.items()}}
    opened = open_data_and_model(options, specs, only_images=only_images)
    contrastive = any(stage.contrastive for stage in stages)
    if contrastive and options.text.text_features is not None:
        raise UserError(f"method {options.method} trains the text encoder and needs prompts: leave out --text-features")
    source, evaluation = opened.sources["train"], {spec: opened.sources[part] for spec, part in parts.items()}

    names = class_names_of(source, options.text.classes, prompts=options.text.text_features is None)
    for spec, data in evaluation.items():
        if (fault := data.classes_beyond(source)) is not None:
            raise UserError(f"test {spec} must have no classes but those of train {options.train}: {fault}")

    images, features = source.limited(options.run.limit), None
    if not images.holds_images or options.train_views == "center" or options.text.text_features == "class-means":
        features = features_of(images, opened.model, title="encode training images", workers=options.run.workers)
    (text,) = text_features(options.text, [ClassGroup(names, features, options.train)], opened.model, opened.text_file)
    setup = open_setup("fft", options, opened, names, text)
    limit = options.run.limit if len(images.ids) < len(source.ids) else None
    captions = None
    if contrastive:
        captions = captions_of(opened.model.loaded(), names, resolve_prompts(options.text.templates, options.train))
    return Task(setup, stages, images, features, evaluation, limit, captions)


def train_and_evaluate(task: Task, options: FFTOptions, folder: RunFolder) -> tuple[dict[str, Any], int]:
    """Train and evaluate every stage.

    Returns the results, and the number of epochs that an earlier run had finished.
    """
    setup = task.setup
    reset_peak_memory()
    start = time.perf_counter()
    model = Classifier(setup.text, setup.head, setup.logit_scale).to(setup.device)
    start_weights = Weights.of(model, setup) if options.ensemble else None
    results: dict[str, Any] = {"training_images": task.num_images, "classes": len(setup.names)}
    done: list[Training] = []
    lines, resumed = [], 0
    for stage in task.stages:
        training, first = train_stage(stage, model, task, options, done, folder)
        done.append(training)
        resumed += first
        save_weights(stage, model, setup, options, folder)
        results[stage.name], records = evaluate_stage(stage, model, task, folder)
        lines += records
    if start_weights is not None:
        end_weights = Weights.of(model, setup)
        for share in options.ensemble:
            start_weights.mean_with(end_weights, share).put_into(model, setup)
            of_means = replace(task.stages[-1], name=f"ensemble-{share:g}")
            # The mean of the classifiers stands for that of the text encoders.
            save_weights(replace(of_means, contrastive=False), model, setup, options, folder)
            results[of_means.name], records = evaluate_stage(of_means, model, task, folder)
            lines += records
        end_weights.put_into(model, setup)
    folder.accept_inputs()
    unreadable = {image.id: image for training in done for image in training.unreadable.values()}
    trained = [{"train": True} | record for record in unreadable_records(unreadable.values(), setup.names)]
    folder.write_lines(IMAGES, trained + lines)
    # An image is evaluated after every stage, but counts once.
    unreadable_evaluated = {(line["test"], line["id"]) for line in lines if line["status"] == "unreadable"}
    results["unreadable"] = len(unreadable) + len(unreadable_evaluated)
    epochs = [record for training in done for record in training.records]
    results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(epochs)}
    return results, resumed


def train_stage(
    stage: Stage, model: Classifier, task: Task, options: FFTOptions, done: list[Training], folder: RunFolder
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
    if done:
        assert done[0].kept_weights is not None
        model.load_state_dict(done[0].kept_weights)
    vlm = setup.model.loaded() if stage.trains_encoder else None
    with stage_step(stage, model, vlm, options, task.captions) as made:
        training = Training(
            folder,
            f"{stage.name}.pt",
            made.trained,
            made.optimizer,
            made.scaler,
            earlier_records=[record for previous in done for record in previous.records],
            group=made.step.group,
        )

        def after_epoch(epoch: int, record: dict[str, Any]) -> None:
            if not stage.trains_encoder and epoch + 1 == options.finetune_from:
                training.kept_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

        plan = stage_plan(
            stage, options, task.images, task.features, setup.model, setup.device, training.note_unreadable
        )
        title = f"full fine-tuning, {stage.name}"
        resumed = train(
            training,
            made.step,
            plan,
            title=title,
            save_every=options.save_every,
            profile=options.run.profile,
            after_epoch=after_epoch,
        )
    if stage.contrastive:
        assert vlm is not None
        vlm.encoder_was_trained()
        with torch.no_grad():
            # The trained text encoder makes the classifier, as the one before the training did.
            prompts = resolve_prompts(options.text.templates, options.train)
            model.weight.copy_(class_features(vlm, setup.names, prompts))
    return training, resumed


@dataclass(frozen=True)
class Weights:
    """The weights of a classifier, its head and the image encoder at one time of the training, by name.

    The mean of the weights at the start and at the end of a training is often better on shifted data than both
    (WiSE-FT, Wortsman et al., CVPR 2022): (1 - alpha) start + alpha end, with the classifier in place of a text
    encoder. It needs no training.
    """

    of_classifier: dict[str, Tensor]
    of_encoder: dict[str, Tensor]

    @classmethod
    def of(cls, model: Classifier, setup: Setup) -> Weights:
        """Copy the present weights."""
        states = (model.state_dict(), setup.model.loaded().model.visual.state_dict())
        return cls(*({name: tensor.detach().clone() for name, tensor in state.items()} for state in states))

    def mean_with(self, end: Weights, share: float) -> Weights:
        """Return the weighted mean with other weights, whose share is given. Whole numbers are taken from the end."""

        def mean(first: dict[str, Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.lerp(first[name], tensor, share) if tensor.is_floating_point() else tensor
                for name, tensor in last.items()
            }

        return Weights(mean(self.of_classifier, end.of_classifier), mean(self.of_encoder, end.of_encoder))

    def put_into(self, model: Classifier, setup: Setup) -> None:
        """Load the weights into a classifier and the image encoder."""
        model.load_state_dict(self.of_classifier)
        setup.model.loaded().model.visual.load_state_dict(self.of_encoder)


def save_weights(stage: Stage, model: Classifier, setup: Setup, options: FFTOptions, folder: RunFolder) -> None:
    """Write the classifier, its head and the encoders that a stage has trained, as safetensors."""
    tensors: dict[str, Tensor] = {"classifier.weight": model.weight}
    if isinstance(model.head, RationalAdapter):
        folder.save_adapter(f"{stage.name}-adapter.safetensors", model.head)
    else:
        tensors |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    if stage.trains_encoder:
        visual = setup.model.loaded().model.visual.state_dict()
        tensors |= {f"{VISUAL}{name}": tensor for name, tensor in visual.items()}
    if stage.contrastive:
        tensors |= {f"{TEXT}{name}": tensor for name, tensor in text_state(setup.model.loaded().model).items()}
    source = setup.sources["train"]
    config = MethodConfig(
        "fft",
        options.method,
        options.model.model if isinstance(setup.model, VisionLanguageModel) else None,
        setup.text.shape[1],
        setup.adapter.config.num_heads,
        options.feature_ratio,
        class_names=setup.names,
        class_folders=source.folders if isinstance(source, ImageFolder) else None,
    )
    folder.save_tensors(f"{stage.name}-model.safetensors", tensors, config.metadata())


def evaluate_stage(
    stage: Stage, model: Classifier, task: Task, folder: RunFolder
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a stage. Returns the accuracies, zero-shot and after the stage, and a record of every image.

    If data have only some of the training classes, such as the 200 of ImageNet-A, only these classes are predicted.
    """
    setup = task.setup

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model.head(images, model.weight, model.logit_scale)
        return logits

    run = setup.options.run
    results, lines, trained = {}, [], ""
    if stage.trains_encoder:
        # The cached features were computed by the encoder as it was loaded, so they do not fit a trained encoder.
        trained = state_fingerprint(setup.model.loaded().model.visual.state_dict())
    for spec, source in task.evaluation.items():
        title = f"test {spec} after {stage.name}"
        images = features_of(source, setup.model, title=title, workers=run.workers, limit=run.limit, trained=trained)
        if images.parts is not None:
            folder.when_stored(images.parts.remove)
        records = evaluate(
            predict,
            images,
            setup.text,
            model.logit_scale,
            names=setup.names,
            title=title,
            device=setup.device,
            labels=source.labels_among(setup.sources["train"]),
            kept=KeptRecords(folder, model.state_dict()),
        )
        lines += [{"stage": stage.name, "test": spec} | record for record in records]
        results[spec] = accuracy_of(records, before="zero_shot", after="adapted")
    return results, lines
