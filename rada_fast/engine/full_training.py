"""The two stages of full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C) and the steps that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from rada_fast.config.commands import FFTOptions
from rada_fast.data.sources import Source
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep, images_at_once
from rada_fast.engine.training import (
    Batch,
    ImageBatches,
    Plan,
    epoch_name,
    feature_batches,
    shuffled,
    warm_up_then_cosine,
)
from rada_fast.errors import UserError
from rada_fast.models.image_features import Features, Unreadable
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.modules.rational_classifier import RationalClassifier

CHECKPOINTED_SHARE = 0.25
"""The share of the encoder's activations that are in memory at a time with checkpoints: all blocks' inputs and the
activations of one block. It is about 1/8 for twelve blocks and more for fewer."""


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
class StageStep:
    """What a stage trains, and how.

    trained: the module of everything that is trained.
    optimizer: its optimiser.
    scaler: the scaler of the loss for float16.
    step: takes the steps.
    """

    trained: nn.ModuleList
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    step: TrainingStep


def learning_rate(stage: Stage, warmup_steps: int, step: int, total: int) -> float:
    """Return the learning rate of a step, counted from 0, of a stage with total steps.

    The rate rises linearly during the warm-up, and then falls to zero as a cosine.
    """
    return warm_up_then_cosine(stage.lr, step, total, min(warmup_steps, total // 5))


def stages_of(options: FFTOptions) -> tuple[Stage, ...]:
    """Return the stages that the options ask for, in their order."""
    first = Stage("rada", options.epochs, options.lr, options.penalty_weight, trains_encoder=False)
    if options.stages == "rada":
        return (first,)
    return first, Stage("rada-ft", options.finetune_epochs, options.finetune_lr, 0.0, trains_encoder=True)


def stage_plan(
    stage: Stage,
    options: FFTOptions,
    images: Source,
    features: Features | None,
    model: Model,
    device: torch.device,
    note_unreadable: Callable[[Iterable[Unreadable]], object],
) -> Plan:
    """Return the epochs of a stage. Their orders and crops depend on the seed, the stage and the epoch alone.

    stage: the stage.
    options: the options of the training.
    images: the training images.
    features: the features of their centre views, if the stage trains on these.
    model: the model that encodes images.
    device: the device of the adapter.
    note_unreadable: a function that takes images that could not be read.
    """
    seed, crops, size = options.run.seed, options.train_views == "crop", options.batch_size
    reads_images = stage.trains_encoder or (crops and images.holds_images)
    fixed = None if reads_images else features
    count = len(images.samples) if fixed is None else len(fixed.labels)

    def batches(epoch: int) -> Iterator[Batch]:
        name = epoch_name(stage.name, epoch)
        if fixed is not None:
            note_unreadable(fixed.unreadable)
            yield from feature_batches(fixed.features, fixed.labels, shuffled(count, seed, name), size, device)
            return
        reader = ImageBatches(
            images.samples, model.loaded(), size, seed, crops=crops, encoded=not stage.trains_encoder,
            workers=options.run.workers,
        )  # fmt: skip
        yield from reader.epoch(name, f"{stage.name} views {epoch}")
        note_unreadable(reader.unreadable.values())

    # This is the largest number of steps: a step is left out if none of its images can be read.
    steps = -(-count // size)

    def rate(epoch: int, step: int) -> float:
        return learning_rate(stage, options.warmup_steps, epoch * steps + step, stage.epochs * steps)

    option = "finetune_lr" if stage.trains_encoder else "lr"
    return Plan(stage.epochs, steps, rate, batches, stage.lr, option, seed, stage.name)


@contextmanager
def stage_step(
    stage: Stage,
    model: RationalClassifier,
    vlm: VisionLanguageModel | None,
    options: FFTOptions,
) -> Iterator[StageStep]:
    """Make what takes the steps of a stage. While the context lasts, the encoder can be trained if the stage trains it.

    stage: the stage.
    model: the adapter and the classifier.
    vlm: the model, whose image encoder the second stage trains; None suffices for the first stage.
    options: the options of the training. Without a micro_batch, images_at_once gives the size of the parts of a step.

    Raises UserError if the encoder has no activation checkpoints, and the options ask for them.
    """
    trained = nn.ModuleList([model])
    objective = Objective(options.penalty, stage.penalty_weight)
    gradients = Gradients(model.adapter, model.weight, model.logit_scale, objective, of_images=stage.trains_encoder)
    encode, extra, encoder = None, 0, None
    device, micro_batch = model.weight.device, options.micro_batch
    if stage.trains_encoder:
        assert vlm is not None
        encoder = vlm.model.visual
        if options.grad_checkpointing and not hasattr(encoder, "set_grad_checkpointing"):
            raise UserError(f"grad_checkpointing needs an image encoder with checkpoints, which {vlm.name} has not")
        trained.append(encoder)
        encoder.requires_grad_(True).train()
        if micro_batch is None:
            share = CHECKPOINTED_SHARE if options.grad_checkpointing else 1.0
            extra = int(share * _activation_bytes(vlm))
        if options.grad_checkpointing:
            encoder.set_grad_checkpointing(True)
    optimizer = training_optimizer(trained.parameters(), "adamw", lr=stage.lr, weight_decay=options.weight_decay)
    if vlm is not None and stage.trains_encoder:
        encode = _encoding(vlm, optimizer)
    if micro_batch is None:
        micro_batch = images_at_once(
            model.adapter.config, len(model.weight), device, fused=gradients.fused, extra=extra
        )
    in_float16 = stage.trains_encoder and vlm is not None and vlm.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=in_float16)
    step = TrainingStep(
        gradients, optimizer, micro_batch=min(micro_batch, options.batch_size), encode=encode, scaler=scaler
    )
    try:
        yield StageStep(trained, optimizer, scaler, step)
    finally:
        if encoder is not None:
            encoder.requires_grad_(False).eval()
            if options.grad_checkpointing:
                encoder.set_grad_checkpointing(False)


def _encoding(vlm: VisionLanguageModel, optimizer: Optimizer) -> Callable[[Tensor, Sequence[str]], Tensor]:
    def encode(images: Tensor, ids: Sequence[str]) -> Tensor:
        features = vlm.image_features_with_grad(images)
        # An overflow in float32 after a step is caused by the learning rate, which the end of the epoch reports.
        if vlm.precision != "float32" or not optimizer.state:
            vlm.check_features(features, "image", ids)
        return features

    return encode


def _activation_bytes(vlm: VisionLanguageModel) -> int:
    """Return how many bytes of one image's activations the trained image encoder keeps for its backward pass."""
    encoder, size = vlm.model.visual, vlm.preprocess.image_size
    images = torch.zeros(2, 3, size, size, device=vlm.device)

    def kept(count: int) -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            features = vlm.image_features_with_grad(images[:count])
        del features
        return sum(storages.values())

    training = encoder.training
    # The statistics of batch normalisation must not change. A difference leaves out what all images share: weights.
    encoder.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
            return max(0, kept(2) - kept(1))
    finally:
        encoder.train(training)
