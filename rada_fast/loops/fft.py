"""Full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C): a linear classifier replaces the text encoder.

The first stage, RAda, trains adapter and classifier over frozen encoders with the mask penalty (Eq. 14). The second
stage, RAda-FT, starts from the weights of the first stage after a few of its epochs and trains adapter, classifier and
image encoder without the penalty (Eq. 15).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rada_fast.config.commands import FFTOptions
from rada_fast.data.sources import Source
from rada_fast.engine.full_training import Stage, stage_plan, stage_step, stages_of
from rada_fast.engine.training import training_time
from rada_fast.errors import UserError
from rada_fast.loops.evaluate import evaluate
from rada_fast.loops.identity import open_folder
from rada_fast.loops.setup import Setup, open_data_and_model, open_setup
from rada_fast.loops.training import Training, train
from rada_fast.loops.zero_shot import check_sample
from rada_fast.models.class_features import ClassGroup, text_features
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import Features, features_of
from rada_fast.modules.rational_classifier import RationalClassifier
from rada_fast.reports.summary import accuracy_of, already_finished, finish, unreadable_records
from rada_fast.runs.folder import RunFolder, reset_peak_memory

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
        check_sample(task.images, f"--train {options.train}", setup)
        results, resumed = train_and_evaluate(task, options, folder)
        return finish(folder, setup.facts(), results, scope=scope, resumed=resumed)


def open_task(options: FFTOptions) -> Task:
    """Open the data, the model and the other files that the options name.

    Raises UserError naming an option that cannot be used.
    """
    only_images = None
    if options.stages == "both":
        only_images = "stages both trains the image encoder and needs images; with feature files give rada"
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
    (text,) = text_features(options.text, [ClassGroup(names, features, source.path)], opened.model, opened.text_file)
    setup = open_setup("fft", options, opened, names, text)
    limit = options.run.limit if len(images.ids) < len(source.ids) else None
    return Task(setup, stages_of(options), images, features, evaluation, limit)


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
    trained = [{"train": True} | record for record in unreadable_records(unreadable.values(), setup.names)]
    folder.write_lines(IMAGES, trained + lines)
    # An image is evaluated after every stage, but counts once.
    unreadable_evaluated = {(line["test"], line["id"]) for line in lines if line["status"] == "unreadable"}
    results["unreadable"] = len(unreadable) + len(unreadable_evaluated)
    epochs = [record for training in done for record in training.records]
    results["time"] = {"seconds": round(time.perf_counter() - start, 3), **training_time(epochs)}
    return results, resumed


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
    if stage.trains_encoder:
        assert done[0].kept_weights is not None
        model.load_state_dict(done[0].kept_weights)
    vlm = setup.model.loaded() if stage.trains_encoder else None
    with stage_step(stage, model, vlm, options) as made:
        training = Training(
            folder,
            f"{stage.name}.pt",
            made.trained,
            made.optimizer,
            made.scaler,
            earlier_records=[record for previous in done for record in previous.records],
        )

        def after_epoch(epoch: int, record: dict[str, Any]) -> None:
            if not stage.trains_encoder and epoch + 1 == options.finetune_from:
                training.kept_weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

        plan = stage_plan(
            stage, options, task.images, task.features, setup.model, setup.device, training.note_unreadable
        )
        resumed = train(training, made.step, plan, title=f"full fine-tuning, {stage.name}", after_epoch=after_epoch)
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
            names=setup.names,
            title=title,
            device=setup.device,
            labels=source.labels_among(setup.sources["train"]),
        )
        lines += [{"stage": stage.name, "test": spec} | record for record in records]
        results[spec] = accuracy_of(records, before="zero_shot", after="adapted")
    return results, lines
