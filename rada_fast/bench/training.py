"""Measure the training steps of efficient and of full fine-tuning, with their encoder and on features."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from rada_fast.bench.costs import BACKWARD, Work, adapter_parameters, forward_work, optimizer_work, step_work
from rada_fast.bench.encoder import (
    counted_encoder_operations,
    drawn_views,
    encoder_work,
    model_sizes,
    module_work,
    plain_features,
)
from rada_fast.bench.inputs import unit_rows
from rada_fast.bench.operators import TRAINING_OPERATORS, OperatorClock
from rada_fast.bench.report import sizes_name
from rada_fast.bench.stages import Figure, Part, Ratio, Setting, Stage, counted_operations, measure
from rada_fast.config.bench import BenchEFTOptions, BenchFFTOptions
from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.engine.efficient_training import efficient_step
from rada_fast.engine.full_training import Stage as TrainingStage
from rada_fast.engine.full_training import StageStep, stage_step
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.engine.training import Batch, Plan, efficient_rate, feature_batches, shuffled, train_epochs
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter
from rada_fast.modules.classifier import Classifier
from rada_fast.ops import use_backend
from rada_fast.runs.progress import progress

LOGIT_SCALE = 100.0
EPOCH = "epoch on cached features"
EPOCH_SHOTS, EPOCH_ROWS, MIN_EPOCH_STEPS = 16, 25600, 8
"""An epoch has so many images of each class, as in most few-shot trainings, but no more than so many rows of all
images and classes, so that it takes about a second; and at least so many steps."""


def model_of(options: BenchEFTOptions | BenchFFTOptions, device: torch.device) -> VisionLanguageModel | None:
    """Load the model that the options name, or return None where only features are measured."""
    if options.embed_dim is not None:
        return None
    chosen, seed = options.model, options.measuring.seed
    return load_model(chosen.model, chosen.pretrained, device=device, precision=chosen.precision, seed=seed)


def eft_figures(options: BenchEFTOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of efficient fine-tuning, for each batch and number of classes."""
    vlm = model_of(options, device)
    for batch in options.batch:
        for classes in options.classes:
            setting = eft_setting(vlm, batch, classes, options, device)
            yield measure(setting, device.type, options.measuring)


def eft_setting(
    vlm: VisionLanguageModel | None, batch: int, classes: int, options: BenchEFTOptions, device: torch.device
) -> Setting:
    """Return the setting of one batch and one number of classes."""
    width = options.embed_dim if vlm is None else vlm.embed_dim
    assert width is not None
    config = AdapterConfig.official(width)
    text, features = unit_rows(classes, width, device=device), unit_rows(batch, width, device=device)
    labels = torch.arange(batch, device=device) % classes
    step = eft_step(config, text)
    optimizing, computing = optimizer_work(adapter_parameters(config)), step_work(config, batch, classes)
    counted = counted_step_operations(config, batch, classes)
    stages = [
        epoch_stage(config, text, batch),
        Stage(
            name="step on cached features",
            inside="the same batch again and again: gradients, optimiser, sums for the record",
            call=lambda: step(features, labels, EFTOptions.lr),
            pictures=batch,
            within=False,
            work=(computing, optimizing),
            operations=counted,
        ),
        Stage(
            name="published step",
            inside="the same with the published arithmetic, autograd and torch.optim.AdamW",
            call=published_step(config, text, features, labels),
            pictures=batch,
            within=False,
            work=(computing, optimizing),
        ),
    ]
    whole = EPOCH
    what = "time of a step with the published arithmetic / time of a step of the epoch"
    ratios = [Ratio("speed-up", "published step", (EPOCH,), what)]
    sizes: dict[str, object] = {"batch": batch, "classes": classes, "embed_dim": width}
    if vlm is not None:
        views, encoding = drawn_views(vlm, batch), encoder_work(vlm, batch)
        whole, iteration_step = "iteration", eft_step(config, text)
        sizes = model_sizes(vlm) | sizes
        encode = Stage(
            name="encode", inside="pictures in memory to features of unit length, and nothing else",
            call=lambda: vlm.image_features(views), pictures=batch, work=(encoding,),
            operations=counted_encoder_operations(vlm, batch),
        )  # fmt: skip
        iteration = Stage(
            name="iteration",
            inside="one training iteration on one repeated batch of pictures in memory, the frozen encoder included",
            call=lambda: iteration_step(vlm.image_features(views), labels, EFTOptions.lr),
            pictures=batch,
            work=(encoding, computing, optimizing),
            operations=counted_encoder_operations(vlm, batch) + counted,
        )
        stages = [encode, *(replace(stage, within=False) for stage in stages), iteration]
        what = "time of an iteration / time to encode its batch alone"
        ratios.insert(0, Ratio("overhead ratio", "iteration", ("encode",), what))
    return Setting(
        name=sizes_name(sizes), sizes=sizes, stages=tuple(stages), whole=whole, ratios=tuple(ratios),
        burst=options.iterations,
    )  # fmt: skip


def epoch_stage(config: AdapterConfig, text: Tensor, batch: int) -> Stage:
    """Return the stage of epochs on cached features, as the command eft runs them.

    Its parts are the compiled operators, which are timed in place: between entering and leaving them, with the caches
    as the step before has left them. The rest is the loop's own overhead: everything that a training does beside the
    operators, from the order of the images to the progress, and the release of memory. Operators that are timed one by
    one, again and again, find their data in the caches, and the difference to a step in an epoch would count as
    overhead although they are at work.
    """
    classes, width = text.shape
    images = min(EPOCH_SHOTS * classes, EPOCH_ROWS // classes)
    steps = max(MIN_EPOCH_STEPS, images // batch)
    features, labels = unit_rows(steps * batch, width), torch.arange(steps * batch) % classes
    clock = OperatorClock()
    adapter = RationalAdapter(config).to(text.device)
    options = EFTOptions("unused", "unused", batch_size=batch)
    with clock.running():
        step = efficient_step(adapter, text, LOGIT_SCALE, options)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        return feature_batches(features, labels, shuffled(len(labels), epoch, "bench"), batch, text.device)

    plan = Plan(1, steps, efficient_rate(options.lr, options.schedule, 1), batches, options.lr)

    def epoch() -> None:
        with clock.running(), progress("bench", None) as advance:
            deque(train_epochs(step, adapter, plan, on_step=advance), maxlen=0)

    optimizing, computing = optimizer_work(adapter_parameters(config)), step_work(config, batch, classes)
    forward = forward_work(config, batch, classes)
    works = {"forward": forward, "backward": Work(BACKWARD * forward.operations, computing.bytes), "update": optimizing}
    return Stage(
        name=EPOCH,
        inside=f"one of the {steps} steps of an epoch on features in memory: batches, steps, progress, record",
        call=epoch,
        pictures=batch,
        repeats=steps,
        work=(computing, optimizing),
        operations=counted_step_operations(config, batch, classes),
        counter=clock if step.is_direct else None,
        counted=tuple(
            Part(
                name,
                f"the operator {own}, from entering to leaving it in place",
                (works[name],) if name in works else (),
            )
            for own, name in TRAINING_OPERATORS.items()
        ),
        rest=Part("loop", "the loop's own overhead: all that an epoch does beside these operators"),
    )


def counted_step_operations(
    config: AdapterConfig, batch: int, classes: int, *, trains_text: bool = False, trains_images: bool = False
) -> float:
    """Return the operations of a forward and a backward pass in plain PyTorch, as PyTorch's counter finds them.

    trains_text, trains_images: whether the gradient of the text features, or that of the images', is computed too.
    """
    adapter = RationalAdapter(config, device="meta")
    features = torch.empty(batch, config.embed_dim, device="meta", requires_grad=trains_images)
    text = torch.empty(classes, config.embed_dim, device="meta", requires_grad=trains_text)
    labels = torch.empty(batch, dtype=torch.int64, device="meta")

    def step() -> None:
        with use_backend("reference"):
            logits, penalty = adapter(features, text, LOGIT_SCALE, penalty="l2")
        (cross_entropy(logits, labels) + penalty).backward()

    return counted_operations(step)


def eft_step(config: AdapterConfig, text: Tensor) -> TrainingStep:
    """Return what takes the steps of efficient fine-tuning, for an adapter of its own with the default options."""
    adapter = RationalAdapter(config).to(text.device)
    objective = Objective(EFTOptions.penalty, EFTOptions.penalty_weight)
    optimizer = training_optimizer(
        adapter.parameters(), EFTOptions.optimizer, lr=EFTOptions.lr, weight_decay=EFTOptions.weight_decay
    )
    return TrainingStep(Gradients(adapter, text, LOGIT_SCALE, objective), optimizer)


def published_step(config: AdapterConfig, text: Tensor, features: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that takes a step as the published code does: its arithmetic, autograd and PyTorch's AdamW."""
    adapter = RationalAdapter(config).to(text.device)
    optimizer = AdamW(adapter.parameters(), lr=EFTOptions.lr, weight_decay=EFTOptions.weight_decay)

    def step() -> None:
        optimizer.zero_grad()
        with use_backend("literal"):
            logits, penalty = adapter(features, text, LOGIT_SCALE, penalty=EFTOptions.penalty)
        (cross_entropy(logits, labels) + EFTOptions.penalty_weight * penalty).backward()
        optimizer.step()

    return step


def fft_figures(options: BenchFFTOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of full fine-tuning, for each stage of training, batch and number of classes."""
    vlm = model_of(options, device)
    trains = [False] if options.stages == "first" or vlm is None else [False, True]
    for trains_encoder in trains:
        for batch in options.batch:
            for classes in options.classes:
                with fft_setting(vlm, batch, classes, options, device, trains_encoder=trains_encoder) as setting:
                    yield measure(setting, device.type, options.measuring)


@contextmanager
def fft_setting(
    vlm: VisionLanguageModel | None,
    batch: int,
    classes: int,
    options: BenchFFTOptions,
    device: torch.device,
    *,
    trains_encoder: bool,
) -> Iterator[Setting]:
    """Return the setting of one batch and one number of classes, as long as the context lasts.

    trains_encoder: whether the stage RAda-FT is measured, which trains the encoder, or the stage RAda.
    """
    width = options.embed_dim if vlm is None else vlm.embed_dim
    assert width is not None
    text = unit_rows(classes, width, device=device)
    classifier = Classifier(text, RationalAdapter(AdapterConfig.official(width)), LOGIT_SCALE).to(device)
    sizes: dict[str, object] = {"batch": batch, "classes": classes, "embed_dim": width}
    sizes = sizes if vlm is None else model_sizes(vlm) | sizes
    stage = FULL if trains_encoder else RADA
    training = FFTOptions("unused", ("unused",), batch_size=batch, memory=options.memory)
    with stage_step(stage, classifier, vlm, training) as taking:
        if trains_encoder:
            assert vlm is not None
            stages = full_stages(vlm, batch, taking, classifier)
        else:
            stages = rada_stages(vlm, batch, taking, classifier)
        overhead = Ratio("overhead ratio", "step", ("encode",), "time of a step / time to encode its batch alone")
        yield Setting(
            name=f"{sizes_name(sizes)}, {stage.name}", sizes=sizes, stages=tuple(stages), whole=stages[-1].name,
            ratios=(overhead,) if vlm is not None else (),
        )  # fmt: skip


RADA = TrainingStage("rada", 1, FFTOptions.lr, FFTOptions.penalty_weight, False)
FULL = TrainingStage("rada-ft", 1, FFTOptions.finetune_lr, 0.0, True)


def rada_stages(vlm: VisionLanguageModel | None, batch: int, taking: StageStep, classifier: Classifier) -> list[Stage]:
    """Return the stages of a step that trains the adapter and the classifier: encoding, and the step on features."""
    classes, width = classifier.weight.shape
    assert isinstance(classifier.head, RationalAdapter)
    device, config = classifier.weight.device, classifier.head.config
    features, labels = unit_rows(batch, width, device=device), torch.arange(batch, device=device) % classes
    trained = sum(parameter.numel() for parameter in classifier.parameters())
    on_features = Stage(
        name="step on features",
        inside="one step of RAda on features in memory: adapter and classifier are trained",
        call=lambda: taking.step(features, labels, RADA.lr),
        pictures=batch,
        work=(step_work(config, batch, classes), optimizer_work(trained)),
        operations=counted_step_operations(config, batch, classes, trains_text=True),
    )
    if vlm is None:
        return [on_features]
    views, encoding = drawn_views(vlm, batch), encoder_work(vlm, batch)
    return [
        Stage(
            name="encode",
            inside="pictures in memory to features of unit length, and nothing else",
            call=lambda: vlm.image_features(views),
            pictures=batch,
            work=(encoding,),
            operations=(encoding_operations := counted_encoder_operations(vlm, batch)),
        ),
        on_features,
        Stage(
            name="step",
            inside="one step of RAda on pictures in memory, which the frozen encoder encodes",
            call=lambda: taking.step(vlm.image_features(views), labels, RADA.lr),
            pictures=batch,
            work=(encoding, *on_features.work),
            operations=encoding_operations + (on_features.operations or 0),
        ),
    ]


def full_stages(vlm: VisionLanguageModel, batch: int, taking: StageStep, classifier: Classifier) -> list[Stage]:
    """Return the step that trains the encoder too, and the encoder's forward pass, which is compared with it."""
    classes, head = len(classifier.weight), classifier.head
    assert isinstance(head, RationalAdapter)
    views, labels = drawn_views(vlm, batch), torch.arange(batch, device=vlm.device) % classes
    trained = sum(parameter.numel() for parameter in taking.trained.parameters())
    forward, config = module_work(vlm, batch), head.config
    encode = Stage(
        name="encode",
        inside="pictures in memory to features by the module that is trained, forward and without gradients",
        call=lambda: plain_features(vlm, views),
        pictures=batch,
        within=False,
        work=(forward,),
        operations=forward.operations,
    )
    step = Stage(
        name="step",
        inside="one step of RAda-FT on pictures in memory: encoder, adapter and classifier are trained",
        call=lambda: taking.step(views, labels, FULL.lr, ["drawn"] * batch),
        pictures=batch,
        work=(
            # The gradients of the weights and those of the activations each take what the forward pass takes.
            Work(3 * forward.operations, 3 * forward.bytes, forward.dtype),
            step_work(config, batch, classes),
            optimizer_work(trained),
        ),
        operations=batch * counted_training_operations(vlm)
        + counted_step_operations(config, batch, classes, trains_text=True, trains_images=True),
    )
    return [encode, step]


def counted_training_operations(vlm: VisionLanguageModel) -> float:
    """Return the operations of encoding a picture and of all gradients of the encoder, as PyTorch's counter finds them.

    The encoder must be one that is trained.
    """
    parameters = [value for value in vlm.model.visual.parameters() if value.requires_grad]

    def train() -> None:
        features = vlm.image_features_with_grad(drawn_views(vlm, 1))
        torch.autograd.grad(features.sum(), parameters, allow_unused=True)

    return counted_operations(train)
