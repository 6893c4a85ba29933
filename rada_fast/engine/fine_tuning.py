"""Efficient and full fine-tuning in one call, on features in memory or data on disk, without a folder for results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import ModelOptions, Precision, RunOptions
from rada_fast.data.open import open_source
from rada_fast.data.sources import FeatureFile, Source
from rada_fast.engine.efficient_training import efficient_plan, efficient_step
from rada_fast.engine.full_training import stage_plan, stage_step, stages_of
from rada_fast.engine.predictor import CLIP_LOGIT_SCALE
from rada_fast.engine.training import Plan, train_epochs
from rada_fast.errors import UserError
from rada_fast.models.class_features import class_features, class_means
from rada_fast.models.class_names import class_names_of
from rada_fast.models.image_features import Features, Unreadable, features_of
from rada_fast.models.prompts import resolve_prompts
from rada_fast.models.vision_language import AbsentModel, Model, VisionLanguageModel, open_model
from rada_fast.modules import RationalAdapter, load_adapter
from rada_fast.modules.classifier import Classifier
from rada_fast.modules.rational_adapter import new_adapter, unwrapped
from rada_fast.ops.rational_adapter import check_text_features

Setting = Literal["eft", "fft"]
OTHER_OPTIONS = frozenset(
    {"train", "test", "new_test", "protocol", "evaluate_every", "run", "model", "text", "adapter"}
    | {"method", "tuning", "ensemble", "pull_weight", "feature_ratio", "sets", "seeds", "root", "evaluate_on"}
)
"""The options of the commands that fine_tune does not have, or has as arguments of its own. It trains RAda alone."""

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class FineTuned:
    """The result of fine_tune.

    adapter: the trained adapter, on the device of the training.
    text_features: T (K, D), with which it was trained. In full fine-tuning they are the trained classifier.
    logit_scale: the multiplier s.
    class_names: the names of the K classes, if they have names.
    model: the model, whose image encoder is trained after the second stage of full fine-tuning, or None without one.
    records: one dictionary for each epoch, with the keys of the lines in epochs.jsonl.
    unreadable: the images that could not be read, with the reasons.
    """

    adapter: RationalAdapter
    text_features: Tensor
    logit_scale: float
    class_names: tuple[str, ...] | None
    model: VisionLanguageModel | None
    records: tuple[Record, ...]
    unreadable: tuple[Unreadable, ...] = ()

    @torch.no_grad()
    def __call__(self, image_features: Tensor) -> Tensor:
        """Return the logits (B, K) of images. image_features: (B, D), unit norm."""
        features = image_features.to(self.text_features.device, self.text_features.dtype)
        logits: Tensor = self.adapter(features, self.text_features, self.logit_scale)
        return logits


def fine_tune(
    train: Tensor | str | Source,
    labels: Tensor | None = None,
    *,
    setting: Setting = "eft",
    model: Model | str | None = None,
    class_names: Sequence[str] | None = None,
    pretrained: str | None = None,
    templates: str | Sequence[str] = "photo",
    text_features: Tensor | Literal["class-means"] | None = None,
    logit_scale: float | None = None,
    adapter: RationalAdapter | AdapterConfig | str | Path | None = None,
    seed: int = 0,
    workers: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    on_epoch: Callable[[Record], object] | None = None,
    **options: Any,
) -> FineTuned:
    """Fine-tune an adapter in memory: over frozen encoders, or together with a classifier and the image encoder.

    Efficient fine-tuning ("eft", RAda, arXiv:2507.15480, Sec. 4.2) trains the adapter with the cross-entropy plus the
    weighted mask penalty. Full fine-tuning ("fft", Sec. 4.1 and App. C) replaces T by a linear classifier: its first
    stage trains adapter and classifier with the penalty (Eq. 14), its second stage also the image encoder, without it
    (Eq. 15). On features in memory, three lines are enough:

        import rada_fast
        tuned = rada_fast.fine_tune(image_features, labels, text_features=text_features, logit_scale=100.0)
        logits = tuned(other_image_features)

    The result depends on the arguments and the seed alone, to the bit on one machine. The arguments are not changed: a
    given adapter is copied, and so is a model whose image encoder is trained.

    train: the features of the training images (N, D), floating point, which are brought to unit norm; or data as
        KIND:PATH, such as "imagefolder:photos" or "features:train.npz"; or data that have been opened.
    labels: (N,) whole numbers from 0 to K - 1, for features in memory only.
    setting: "eft" or "fft".
    model: a loaded model, or its name as in open_model: "embedded", or one of open_clip's. Images and prompts need one.
    class_names: the names of the K classes; None takes those of the data.
    pretrained, device, precision: the weights, the device and the arithmetic of a model that is given by its name. The
        device is also that of a training without a model.
    templates: the prompts; see resolve_prompts.
    text_features: T (K, D) instead of prompts, or "class-means" for the mean feature of each class's training images.
    logit_scale: the multiplier s; None takes the model's, the data's, or CLIP's 100.
    adapter: the adapter to start from, or its file, or the configuration of a new one; None is a new one with the
        published code's arithmetic. Parameters whose requires_grad is False do not change.
    seed: decides the order of the images, the crops, and the weights of a new adapter.
    workers: the number of processes that read images.
    on_epoch: a function that is called with the record of each epoch.
    options: those of the command, by name: of eft, shots, epochs, batch_size, lr, optimizer, weight_decay, schedule,
        penalty, penalty_weight and train_views; of fft, stages, epochs, finetune_from, finetune_epochs, batch_size,
        micro_batch, memory, grad_checkpointing, lr, finetune_lr, weight_decay, warmup_steps, penalty, penalty_weight
        and train_views. Features have no crops and no second stage, so that for them train_views is "center" and stages
        "first" unless given.

    Returns FineTuned. Raises UserError, a ValueError, or TypeError naming the argument that cannot be used.
    """
    source = _opened(train, labels, class_names)
    chosen = _options(setting, options, RunOptions(seed=seed, workers=workers), images=source.holds_images)
    model = _model(model, pretrained, device, precision, seed, needed=source.holds_images or text_features is None)
    vlm = model if isinstance(model, VisionLanguageModel) else None
    if isinstance(chosen, EFTOptions) and chosen.shots is not None:
        source = source.few_shot(chosen.shots, seed)
    uses_features = not source.holds_images or text_features == "class-means" or setting == "eft"
    features = None
    if uses_features or chosen.train_views == "center":
        features = features_of(source, model, title="encode training images", workers=workers)
    names = class_names
    if names is None and (source.holds_images or text_features is None):
        names = class_names_of(source, None, prompts=text_features is None)
    text = _text_features(text_features, names, templates, vlm, features, source)
    _check_classes(source, names, text)
    scale = logit_scale if logit_scale is not None else vlm.logit_scale if vlm is not None else source.logit_scale
    scale = CLIP_LOGIT_SCALE if scale is None else float(scale)
    own = _adapter(adapter, text.shape[1], seed).to(model.device)
    text = text.to(model.device)
    unreadable: dict[str, Unreadable] = {}

    def note(images: Any) -> None:
        unreadable.update((image.id, image) for image in images)

    run = _Run(source, features, model, own, text, scale, note, on_epoch)
    records, text, vlm = run.efficient(chosen) if isinstance(chosen, EFTOptions) else run.full(chosen)
    return FineTuned(
        own, text, scale, None if names is None else tuple(names), vlm, tuple(records), tuple(unreadable.values())
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """What a call of fine_tune trains, and on what."""

    source: Source
    features: Features | None
    model: Model
    adapter: RationalAdapter
    text: Tensor
    scale: float
    note: Callable[[Any], None]
    on_epoch: Callable[[Record], object] | None

    @property
    def vlm(self) -> VisionLanguageModel | None:
        return self.model if isinstance(self.model, VisionLanguageModel) else None

    def efficient(self, options: EFTOptions) -> tuple[list[Record], Tensor, VisionLanguageModel | None]:
        assert self.features is not None
        step = efficient_step(self.adapter, self.text, self.scale, options)
        plan = efficient_plan(options, self.source, self.features, self.model, self.text.device, self.note)
        records = []
        for record in train_epochs(step, self.adapter, plan):
            plan.release()
            records.append(self._finished(record))
        return records, self.text, self.vlm

    def full(self, options: FFTOptions) -> tuple[list[Record], Tensor, VisionLanguageModel | None]:
        classifier = Classifier(self.text, self.adapter, self.scale)
        stages, records, vlm = stages_of(options), [], self.vlm
        kept: dict[str, Tensor] = {}
        for stage in stages:
            if stage.trains_encoder:
                classifier.load_state_dict(kept)
                vlm = None if vlm is None else copy.deepcopy(vlm)
            model: Model = self.model if vlm is None else vlm
            with stage_step(stage, classifier, vlm if stage.trains_encoder else None, options) as made:
                plan: Plan = stage_plan(stage, options, self.source, self.features, model, self.text.device, self.note)
                for record in train_epochs(made.step, made.trained, plan):
                    records.append(self._finished(record))
                    if len(stages) > 1 and not stage.trains_encoder and record["epoch"] == options.finetune_from:
                        kept = {name: value.detach().clone() for name, value in classifier.state_dict().items()}
            if stage.trains_encoder and vlm is not None:
                vlm.encoder_was_trained()
        return records, classifier.weight.detach(), vlm

    def _finished(self, record: Record) -> Record:
        if self.on_epoch is not None:
            self.on_epoch(record)
        return record


def _opened(train: Tensor | str | Source, labels: Tensor | None, class_names: Sequence[str] | None) -> Source:
    """Return the training data in the form in which readers return them."""
    if not isinstance(train, Tensor):
        if labels is not None:
            raise UserError("labels belong to features in memory, and the data that train names have their own")
        source = open_source(train, "train") if isinstance(train, str) else train
        if not source.has_classes:
            raise UserError(f"train must be data with classes, got {source.description}")
        return source
    if train.ndim != 2 or len(train) == 0:
        raise UserError(f"train must be features (N, D) with N >= 1, got {tuple(train.shape)}")
    if not train.is_floating_point():
        raise TypeError(f"train must be floating point, got {train.dtype}")
    if labels is None:
        raise UserError("labels must be given for features in memory")
    if labels.shape != train.shape[:1]:
        raise UserError(f"labels must be ({len(train)},) as train has rows, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    features, labels = train.detach().float().cpu(), labels.detach().long().cpu()
    if not bool(features.isfinite().all()):
        raise UserError("train must hold finite numbers, got NaN or infinity")
    if int(labels.min()) < 0:
        raise UserError(f"labels must not be negative, got {int(labels.min())}")
    ids = tuple(str(row) for row in range(len(train)))
    return FeatureFile(Path("memory"), features, labels, ids, None if class_names is None else tuple(class_names))


def _options(setting: str, given: dict[str, Any], run: RunOptions, *, images: bool) -> EFTOptions | FFTOptions:
    """Return the checked options of a setting. images: whether the data are images, which have crops and an encoder."""
    if setting not in ("eft", "fft"):
        raise UserError(f"setting must be eft or fft, got {setting!r}")
    known = {field.name for field in fields(EFTOptions if setting == "eft" else FFTOptions)} - OTHER_OPTIONS
    if unknown := sorted(set(given) - known):
        raise TypeError(
            f"fine_tune has no option {unknown[0]!r} for setting {setting!r}; it has {', '.join(sorted(known))}"
        )
    if not images:
        if given.get("train_views", "center") == "crop" and setting == "eft":
            raise UserError("train_views crop needs images, and train holds features")
        if given.get("stages", "first") != "first":
            raise UserError("stages both trains the image encoder and needs images; with features give first")
        given = given | ({"train_views": "center"} if setting == "eft" else {"stages": "first"})
    if setting == "eft":
        return EFTOptions(train="memory", test="memory", protocol="all", run=run, **given)
    # The options of the second stage are not read if it is left out, so that epochs alone may be given then.
    if given.get("stages") == "first" and "finetune_from" not in given:
        given = given | {"finetune_from": 1}
    return FFTOptions(train="memory", test=("memory",), run=run, **given)


def _model(
    model: Model | str | None, pretrained: str | None, device: str, precision: Precision, seed: int, *, needed: bool
) -> Model:
    if isinstance(model, VisionLanguageModel | AbsentModel):
        return model
    if model is None and needed:
        raise UserError("model must be given, because images or prompts have to be encoded")
    options = ModelOptions(model=model or "embedded", pretrained=pretrained, device=device, precision=precision)
    return open_model(options, needed=model is not None, seed=seed)


def _text_features(
    given: Tensor | str | None,
    names: Sequence[str] | None,
    templates: str | Sequence[str],
    vlm: VisionLanguageModel | None,
    features: Features | None,
    source: Source,
) -> Tensor:
    """Return T (K, D) float32 on the CPU."""
    if isinstance(given, Tensor):
        if given.ndim != 2 or not given.is_floating_point() or not bool(given.isfinite().all()):
            raise UserError(f"text_features must be finite numbers (K, D), got {tuple(given.shape)} {given.dtype}")
        text = given.detach().float().cpu()
    elif given == "class-means":
        text = class_means(features, source.num_classes if names is None else len(names))
    elif given is not None:
        raise UserError(f"text_features must be a tensor (K, D), class-means or None, got {given!r}")
    else:
        assert vlm is not None
        assert names is not None
        prompts = resolve_prompts(templates, str(source.path))
        prompts.check(names)
        text = class_features(vlm, names, prompts)
    width = vlm.embed_dim if source.holds_images and vlm is not None else source.width
    check_text_features(text, text.shape[1] if width is None else width)
    return text


def _check_classes(source: Source, names: Sequence[str] | None, text: Tensor) -> None:
    if names is not None and len(names) != len(text):
        raise UserError(f"text_features must have a row for each of the {len(names)} class names, got {len(text)}")
    if source.num_classes > len(text):
        raise UserError(f"labels must be below the number of classes {len(text)}, got {source.num_classes - 1}")


def _adapter(given: RationalAdapter | AdapterConfig | str | Path | None, width: int, seed: int) -> RationalAdapter:
    """Return an adapter of the call's own in float32."""
    if isinstance(given, nn.Module):
        adapter = copy.deepcopy(unwrapped(given)).float()
    elif isinstance(given, str | Path):
        adapter = load_adapter(given).float()
    else:
        adapter = new_adapter(AdapterConfig.official(width) if given is None else given, seed)
    if adapter.config.embed_dim != width:
        raise UserError(f"adapter has width {adapter.config.embed_dim}, the text features have {width}")
    return adapter
