"""The stages of full fine-tuning (RAda, arXiv:2507.15480, Sec. 4.1, App. C and D) and the steps that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from rada_fast.config.checks import bytes_of
from rada_fast.config.commands import FFTOptions
from rada_fast.config.methods import FFT_METHODS
from rada_fast.data.sources import Source
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.parts import images_at_once, part_bytes
from rada_fast.engine.sharded_encoders import EncodersOfGroup, ScalerOfParts, encoders_of_group
from rada_fast.engine.sharing import counts_of, group_for, own_part
from rada_fast.engine.steps import (
    ContrastiveGradients,
    Gradients,
    Objective,
    TrainedText,
    TrainingStep,
)
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
from rada_fast.models.encoder_tuning import Captions
from rada_fast.models.image_features import Features, Unreadable
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.modules.classifier import Classifier
from rada_fast.system.ranks import Ranks

CHECKPOINTED_SHARE = 0.25
"""The share of the encoder's activations that are in memory at a time with checkpoints: all blocks' inputs and the
activations of one block. It is about 1/8 for twelve blocks and more for fewer."""


@dataclass(frozen=True)
class Stage:
    """A stage of training, of a row of FFT_METHODS.

    name: the name of the stage, such as "rada" or "rada-ft".
    epochs: the number of epochs.
    lr: the largest learning rate.
    penalty_weight: the factor of the mask penalty in the loss.
    trains_encoder: whether the stage trains the image encoder too.
    contrastive: whether it trains the text encoder in place of the classifier, with CLIP's contrastive loss.
    pull_weight: the factor of the pull towards the weights at the start, or None for none.
    """

    name: str
    epochs: int
    lr: float
    penalty_weight: float
    trains_encoder: bool
    contrastive: bool = False
    pull_weight: float | None = None


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
    method = FFT_METHODS[options.method]
    rows = method.stages[:1] if options.stages == "first" else method.stages
    return tuple(
        Stage(
            row.name,
            options.finetune_epochs if number else options.epochs,
            options.lr if row.trains == "head" else options.finetune_lr,
            options.penalty_weight if row.trains == "head" and method.head == "rational" else 0.0,
            trains_encoder=row.trains != "head",
            contrastive=row.trains == "both-encoders",
            pull_weight=options.pull_weight if row.pull else None,
        )
        for number, row in enumerate(rows)
    )


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
    group = group_for(size)
    reads_images = stage.trains_encoder or (crops and images.holds_images)
    fixed = None if reads_images else features
    count = len(images.samples) if fixed is None else len(fixed.labels)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        name = epoch_name(stage.name, epoch)
        if fixed is not None:
            note_unreadable(fixed.unreadable)
            order = shuffled(count, seed, name)
            yield from feature_batches(fixed.features, fixed.labels, order, size, device, group, first=first)
            return
        reader = ImageBatches(
            images.samples, model.loaded(), size, seed, crops=crops, encoded=not stage.trains_encoder,
            workers=options.run.workers, note_unreadable=note_unreadable, group=group,
        )  # fmt: skip
        yield from reader.epoch(name, f"{stage.name} views {epoch}", first)

    # This is the largest number of steps: a step is left out if none of its images can be read.
    steps = -(-count // size)

    def rate(epoch: int, step: int) -> float:
        return learning_rate(stage, options.warmup_steps, epoch * steps + step, stage.epochs * steps)

    option = "finetune_lr" if stage.trains_encoder else "lr"
    return Plan(stage.epochs, steps, rate, batches, stage.lr, option, seed, stage.name, group=group)


@contextmanager
def stage_step(
    stage: Stage,
    model: Classifier,
    vlm: VisionLanguageModel | None,
    options: FFTOptions,
    captions: Captions | None = None,
) -> Iterator[StageStep]:
    """Make what takes the steps of a stage. While the context lasts, the encoder can be trained if the stage trains it.

    stage: the stage.
    model: the classifier and its head.
    vlm: the model, whose encoders a stage may train; None suffices for a stage with frozen encoders.
    options: the options of the training. Without a micro_batch, images_at_once gives the size of the parts of a
        step, for the budget of budget_of_parts if they name a memory.
    captions: the prompts of the classes, for a contrastive stage.

    Raises UserError if the encoder has no activation checkpoints, and the options ask for them.
    """
    objective = Objective(options.penalty, stage.penalty_weight)
    gradients: Gradients | ContrastiveGradients
    gradients = Gradients(model.head, model.weight, model.logit_scale, objective, of_images=stage.trains_encoder)
    encode, text, adjust = None, None, None
    device, micro_batch = model.weight.device, options.micro_batch
    group = group_for(options.batch_size)
    with ExitStack() as context:
        trained, extra, encoders = nn.ModuleList([model]), 0, None
        if stage.trains_encoder:
            assert vlm is not None
            extra = context.enter_context(_trainable(stage, vlm, options))
            encoders = context.enter_context(encoders_of_group(vlm, group, options.shard, of_text=stage.contrastive))
            if options.grad_checkpointing:
                vlm.model.visual.set_grad_checkpointing(True)
            if stage.contrastive:
                assert captions is not None
                trained = nn.ModuleList([vlm.model])
                captioning = _captioning(vlm, captions, encoders, group)
                text = TrainedText(model.weight.detach().clone().requires_grad_(), captioning, of_images=True)
                gradients = ContrastiveGradients(text, model.logit_scale)
            else:
                trained.append(vlm.model.visual)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        weight_decay = options.weight_decay
        if stage.pull_weight is not None:
            adjust, weight_decay = _pull(parameters, stage.pull_weight), 0.0
        optimizer = training_optimizer(parameters, "adamw", lr=stage.lr, weight_decay=weight_decay)
        if vlm is not None and stage.trains_encoder:
            encode = _encoding(vlm, optimizer, encoders)
        if micro_batch is None:
            budget = None
            if options.memory is not None:
                side = vlm.preprocess.image_size if vlm is not None and stage.trains_encoder else None
                head = part_bytes(model.head.config, len(model.weight), device, fused=gradients.fused)
                least = head.of(1) + extra
                budget = budget_of_parts(options, parameters, model.weight.shape[1], side, least)
            micro_batch = images_at_once(
                model.head.config, len(model.weight), device, fused=gradients.fused, extra=extra, budget=budget
            )
        in_float16 = stage.trains_encoder and vlm is not None and vlm.precision == "float16"
        kind = ScalerOfParts if encoders is not None and encoders.sharded else torch.amp.GradScaler
        scaler = kind(device.type, enabled=in_float16)
        step = TrainingStep(
            gradients, optimizer, micro_batch=min(micro_batch, options.batch_size), encode=encode, scaler=scaler,
            text=text, adjust=adjust, group=group, encoders=encoders,
        )  # fmt: skip
        yield StageStep(trained, optimizer, scaler, step)


@contextmanager
def _trainable(stage: Stage, vlm: VisionLanguageModel, options: FFTOptions) -> Iterator[int]:
    """Let the encoders that a stage trains be trained while the context lasts.

    Yields how many bytes an image's activations take, or 0 if the options give the size of the parts of a step.

    Raises UserError if the image encoder has no activation checkpoints, and the options ask for them.
    """
    encoder, extra = vlm.model.visual, 0
    if options.grad_checkpointing and not hasattr(encoder, "set_grad_checkpointing"):
        raise UserError(f"grad_checkpointing needs an image encoder with checkpoints, which {vlm.name} has not")
    if stage.contrastive:
        _thaw_text_encoder(vlm)
    vlm.train_image_encoder(True)
    if options.micro_batch is None:
        share = CHECKPOINTED_SHARE if options.grad_checkpointing else 1.0
        extra = int(share * _activation_bytes(vlm))
    try:
        yield extra
    finally:
        vlm.model.requires_grad_(False).eval()
        if options.grad_checkpointing:
            encoder.set_grad_checkpointing(False)


def budget_of_parts(options: FFTOptions, parameters: Sequence[Tensor], width: int, side: int | None, least: int) -> int:
    """Return how many bytes of the option --memory are left for the images of one part of a step.

    With P numbers in all trained parameters, batches of B images, width D and S x S pixels of an image, these are the
    memory without

        20 P + 4 B D    or, where the encoder is trained,    20 P + 24 B S^2

    bytes: the parameters, their two moments, the sum of the gradients and those of one part, all float32; and the
    features of a batch, or the pixels of one batch and of another that is read ahead. Several processes share the
    images of a batch. Where each stores a part of the parameters, 16 of the 20 bytes count for this part alone.

    options: the options of the training, with a memory.
    parameters: what is trained.
    width, side: D, and S or None where the inputs are features.
    least: what a part of a single image takes.

    Raises UserError if less is left.
    """
    assert options.memory is not None
    memory = bytes_of("memory", options.memory)
    images = max(counts_of(options.batch_size, group_for(options.batch_size)))
    inputs = images * (4 * width if side is None else 24 * side**2)
    numbers, own = (sum(one.numel() for one in values) for values in (parameters, map(own_part, parameters)))
    fixed = 16 * own + 4 * numbers + inputs
    if memory < fixed + least:
        needed = f"{-(-(fixed + least) // 2**20)}MiB for batches of {options.batch_size}"
        raise UserError(f"memory must be at least {needed}, got {options.memory}")
    return memory - fixed


def _thaw_text_encoder(vlm: VisionLanguageModel) -> None:
    """Let everything but the image encoder be trained, and the scale and the bias of the logits neither."""
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(not name.startswith("visual.") and name not in ("logit_scale", "logit_bias"))
    vlm.model.train()


def _captioning(
    vlm: VisionLanguageModel, captions: Captions, encoders: EncodersOfGroup | None, group: Ranks
) -> Callable[[Tensor, slice], Tensor]:
    """Return a function from the labels (B,) of a step's images to the features of one caption for each of some images.

    A caption is one of the prompts of the image's class, drawn at random, as FLYP does (Goyal et al., CVPR 2023). The
    first process draws those of all images, so that they do not depend on how many processes there are.
    """

    text_features = vlm.text_features_with_grad if encoders is None else encoders.text_features

    def encode(labels: Tensor, own: slice) -> Tensor:
        tokens = captions.drawn(labels.cpu()) if group.first else captions.tokens.new_zeros(1, 1)
        tokens = tokens.expand(len(labels), captions.tokens.shape[1]).contiguous()
        group.all_reduce([tokens])
        return text_features(tokens[own].to(vlm.device))

    return encode


def _pull(parameters: Sequence[Tensor], weight: float) -> Callable[[Tensor | float], None]:
    """Return a function that adds the gradients of a pull towards the present weights (L2-SP, Li et al., ICML 2018).

    With the weights w and those at the start w0, the loss gets the term weight / 2 |w - w0|^2.
    """
    starts = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def adjust(scale: Tensor | float) -> None:
        for parameter, start in zip(parameters, starts, strict=True):
            if parameter.grad is not None:
                parameter.grad += (parameter - start) * (weight * scale)

    return adjust


def _encoding(
    vlm: VisionLanguageModel, optimizer: Optimizer, encoders: EncodersOfGroup | None
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    image_features = vlm.image_features_with_grad if encoders is None else encoders.image_features

    def encode(images: Tensor, ids: Sequence[str]) -> Tensor:
        features = image_features(images)
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
    # A difference leaves out what all images share: weights.
    encoder.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[vlm.device] if vlm.device.type == "cuda" else []):
            return max(0, kept(2) - kept(1))
    finally:
        if training:
            vlm.train_image_encoder(True)
