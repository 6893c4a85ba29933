"""Efficient fine-tuning (RAda, arXiv:2507.15480, Sec. 4.2): the steps and the epochs that train an adapter alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rada_fast.config.commands import EFTOptions
from rada_fast.data.sources import Source
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.parts import images_at_once
from rada_fast.engine.sharing import group_for
from rada_fast.engine.steps import Gradients, Objective, TrainedText, TrainingStep
from rada_fast.engine.training import Batch, ImageBatches, Plan, efficient_rate, epoch_name, feature_batches, shuffled
from rada_fast.models.encoded_parts import EncodedParts
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.image_features import Features, Unreadable, encode_crops
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.modules.heads import Head

MOMENTUM = 0.9
"""The momentum of SGD in the published configurations."""


@dataclass(frozen=True, eq=False)
class TunedEncoders:
    """Encoders inside which something is trained.

    tuning: what is trained; vlm: the model; tokens: the prompts (K, L) of the classes.
    """

    tuning: EncoderTuning
    vlm: VisionLanguageModel
    tokens: Tensor

    def text_features(self, labels: Tensor, own: slice) -> Tensor:
        """Encode all classes, whatever the images of a step are. Returns (K, D) with gradients."""
        with self.tuning.attached():
            return self.vlm.text_features_with_grad(self.tokens)

    def image_features(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """Encode images to features (B, D) with gradients. Raises UserError if they are not usable."""
        with self.tuning.attached():
            features = self.vlm.image_features_with_grad(images)
        self.vlm.check_features(features, "image", ids)
        return features


def efficient_step(
    head: Head,
    text_features: Tensor,
    logit_scale: float,
    options: EFTOptions,
    tuned: TunedEncoders | None = None,
) -> TrainingStep:
    """Make what takes the steps of a head over frozen encoders.

    head: the rational adapter, or the head of another method, to train, on its device.
    text_features: T (K, D); logit_scale: the multiplier s.
    options: the options of the training; those of the data, the model and the run are not read.
    tuned: the encoders, if something inside them is trained too.
    """
    trained = [value for value in head.parameters() if value.requires_grad]
    text, encode, scaler, of_images = None, None, None, False
    if tuned is not None:
        trained += tuned.tuning.parameters()
        text_features = text_features.clone().requires_grad_()
        text = TrainedText(text_features, tuned.text_features)
        of_images = tuned.tuning.changes_images
        encode = tuned.image_features if of_images else None
        scaler = torch.amp.GradScaler(text_features.device.type, enabled=tuned.vlm.precision == "float16")
    optimizer = training_optimizer(
        trained, options.optimizer, lr=options.lr, weight_decay=options.weight_decay, momentum=MOMENTUM
    )
    objective = Objective(options.penalty, options.penalty_weight)
    gradients = Gradients(head, text_features, logit_scale, objective, of_images=of_images)
    most = images_at_once(head.config, len(text_features), text_features.device, fused=gradients.fused)
    return TrainingStep(
        gradients, optimizer, micro_batch=min(most, options.batch_size), text=text, encode=encode, scaler=scaler,
        group=group_for(options.batch_size),
    )  # fmt: skip


def efficient_plan(
    options: EFTOptions,
    images: Source,
    features: Features,
    model: Model,
    device: torch.device,
    note_unreadable: Callable[[Iterable[Unreadable]], object],
    tuned: TunedEncoders | None = None,
) -> Plan:
    """Return the epochs of efficient fine-tuning.

    Each epoch has its own order of the images, which depends on the seed and the epoch alone. With train_views "crop",
    an epoch first encodes a random crop of each image, which depends on the seed, the epoch and the image alone.

    options: the options of the training.
    images: the training images; features: the features of their centre views.
    model: the model that encodes crops.
    device: the device of the adapter.
    note_unreadable: a function that takes images that could not be read.
    tuned: the encoders, if something inside them is trained. If this changes the features of images, an epoch reads the
        images themselves.
    """
    seed, workers, group = options.run.seed, options.run.workers, group_for(options.batch_size)
    crops_on_disk: list[EncodedParts | None] = []

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        rows, name = features, epoch_name(None, epoch)
        if tuned is not None and tuned.tuning.changes_images:
            crops = options.train_views == "crop"
            reader = ImageBatches(
                images.samples, tuned.vlm, options.batch_size, seed, crops=crops, encoded=False, workers=workers,
                note_unreadable=note_unreadable, group=group,
            )  # fmt: skip
            yield from reader.epoch(name, f"views {epoch}", first)
            return
        if options.train_views == "crop":
            title = f"encode epoch {epoch + 1}"
            rows = encode_crops(images.samples, model.loaded(), title=title, seed=seed, draw=name, workers=workers)
            crops_on_disk.append(rows.parts)
        note_unreadable(rows.unreadable)
        order = shuffled(len(rows.labels), seed, name)
        yield from feature_batches(rows.features, rows.labels, order, options.batch_size, device, group, first=first)

    def release() -> None:
        while crops_on_disk:
            if (parts := crops_on_disk.pop()) is not None:
                parts.remove()

    note_unreadable(features.unreadable)
    rate = efficient_rate(options.lr, options.schedule, options.epochs)
    steps = -(-len(features.ids) // options.batch_size)
    return Plan(options.epochs, steps, rate, batches, options.lr, seed=seed, release=release, group=group)
