"""Efficient fine-tuning (RAda, arXiv:2507.15480, Sec. 4.2): the steps and the epochs that train an adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from rada_fast.config.commands import EFTOptions
from rada_fast.data.sources import Source
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep, images_at_once
from rada_fast.engine.training import Batch, Plan, efficient_rate, epoch_name, feature_batches, shuffled
from rada_fast.models.image_features import Features, Unreadable, encode_crops
from rada_fast.models.vision_language import Model
from rada_fast.modules.heads import Head

MOMENTUM = 0.9
"""The momentum of SGD in the published configurations."""


def efficient_step(head: Head, text_features: Tensor, logit_scale: float, options: EFTOptions) -> TrainingStep:
    """Make what takes the steps of a head over frozen encoders.

    head: the rational adapter, or the head of another method, to train, on its device.
    text_features: T (K, D); logit_scale: the multiplier s.
    options: the options of the training; those of the data, the model and the run are not read.
    """
    trained = [value for value in head.parameters() if value.requires_grad]
    optimizer = training_optimizer(
        trained, options.optimizer, lr=options.lr, weight_decay=options.weight_decay, momentum=MOMENTUM
    )
    gradients = Gradients(head, text_features, logit_scale, Objective(options.penalty, options.penalty_weight))
    most = images_at_once(head.config, len(text_features), text_features.device, fused=gradients.fused)
    return TrainingStep(gradients, optimizer, micro_batch=min(most, options.batch_size))


def efficient_plan(
    options: EFTOptions,
    images: Source,
    features: Features,
    model: Model,
    device: torch.device,
    note_unreadable: Callable[[Iterable[Unreadable]], object],
) -> Plan:
    """Return the epochs of efficient fine-tuning.

    Each epoch has its own order of the images, which depends on the seed and the epoch alone. With train_views "crop",
    an epoch first encodes a random crop of each image, which depends on the seed, the epoch and the image alone.

    options: the options of the training.
    images: the training images; features: the features of their centre views.
    model: the model that encodes crops.
    device: the device of the adapter.
    note_unreadable: a function that takes images that could not be read.
    """
    seed, workers = options.run.seed, options.run.workers

    def batches(epoch: int) -> Iterator[Batch]:
        rows, name = features, epoch_name(None, epoch)
        if options.train_views == "crop":
            title = f"encode epoch {epoch + 1}"
            rows = encode_crops(images.samples, model.loaded(), title=title, seed=seed, draw=name, workers=workers)
        note_unreadable(rows.unreadable)
        order = shuffled(len(rows.labels), seed, name)
        return feature_batches(rows.features, rows.labels, order, options.batch_size, device)

    note_unreadable(features.unreadable)
    rate = efficient_rate(options.lr, options.schedule, options.epochs)
    steps = -(-len(features.ids) // options.batch_size)
    return Plan(options.epochs, steps, rate, batches, options.lr, seed=seed)
