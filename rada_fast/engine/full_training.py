"""The two stages of full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1 and App. C) and the steps that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from rada_fast.config.method import MaskPenalty
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep, images_at_once
from rada_fast.engine.training import warm_up_then_cosine
from rada_fast.errors import UserError
from rada_fast.models.vision_language import VisionLanguageModel
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


@contextmanager
def stage_step(
    stage: Stage,
    model: RationalClassifier,
    vlm: VisionLanguageModel | None,
    *,
    batch_size: int,
    weight_decay: float,
    penalty: MaskPenalty,
    micro_batch: int | None = None,
    grad_checkpointing: bool = False,
) -> Iterator[StageStep]:
    """Make what takes the steps of a stage. While the context lasts, the encoder can be trained if the stage trains it.

    stage: the stage.
    model: the adapter and the classifier.
    vlm: the model, whose image encoder the second stage trains; None suffices for the first stage.
    batch_size: the number of images in a step.
    weight_decay: AdamW's weight decay.
    penalty: the kind of the mask penalty.
    micro_batch: the number of images that are computed at once, or None for what images_at_once gives.
    grad_checkpointing: whether the encoder computes its activations again in the backward pass instead of keeping them.

    Raises UserError if the encoder has no such checkpoints.
    """
    trained = nn.ModuleList([model])
    objective = Objective(penalty, stage.penalty_weight)
    gradients = Gradients(model.adapter, model.weight, model.logit_scale, objective, of_images=stage.trains_encoder)
    encode, extra, encoder = None, 0, None
    device = model.weight.device
    if stage.trains_encoder:
        assert vlm is not None
        encoder = vlm.model.visual
        if grad_checkpointing and not hasattr(encoder, "set_grad_checkpointing"):
            raise UserError(f"grad_checkpointing needs an image encoder with checkpoints, which {vlm.name} has not")
        trained.append(encoder)
        encoder.requires_grad_(True).train()
        if micro_batch is None:
            share = CHECKPOINTED_SHARE if grad_checkpointing else 1.0
            extra = int(share * _activation_bytes(vlm))
        if grad_checkpointing:
            encoder.set_grad_checkpointing(True)
    optimizer = training_optimizer(trained.parameters(), "adamw", lr=stage.lr, weight_decay=weight_decay)
    if vlm is not None and stage.trains_encoder:
        encode = _encoding(vlm, optimizer)
    if micro_batch is None:
        micro_batch = images_at_once(
            model.adapter.config, len(model.weight), device, fused=gradients.fused, extra=extra
        )
    in_float16 = stage.trains_encoder and vlm is not None and vlm.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=in_float16)
    step = TrainingStep(gradients, optimizer, micro_batch=min(micro_batch, batch_size), encode=encode, scaler=scaler)
    try:
        yield StageStep(trained, optimizer, scaler, step)
    finally:
        if encoder is not None:
            encoder.requires_grad_(False).eval()
            if grad_checkpointing:
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
