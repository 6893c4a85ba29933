"""What every loop starts from, opened once and checked: data, model, device, scale, then classes, T and adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rada_fast import _env
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.options import AdapterOptions, ClassOptions, ModelOptions, RunOptions
from rada_fast.data.open import open_source
from rada_fast.data.readers.features import read_feature_file
from rada_fast.data.sources import FeatureFile, Source
from rada_fast.errors import UserError
from rada_fast.extension import libraries
from rada_fast.loops.features import Features, class_means, encode_images
from rada_fast.models.class_features import (
    class_features,
    given_text_features,
    resolve_templates,
    warn_of_cut_names,
    warn_of_equal_features,
)
from rada_fast.models.class_names import names_of_labels, resolve_class_names
from rada_fast.models.trained import read_classifier
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter, load_adapter
from rada_fast.modules.checkpoint import states_configuration
from rada_fast.ops import backends
from rada_fast.runs.progress import progress
from rada_fast.system import notices

RunConfig = TTTOptions | EFTOptions | FFTOptions

DEFAULT_LOGIT_SCALE = 100.0
"""CLIP's multiplier after training, for feature files that come without a model."""
LEAST_LOGIT_SCALE = 5.0
"""Multipliers of trained models are far above this, their logarithms below: CLIP's are 100 and 4.6052."""


@dataclass(frozen=True)
class Setup:
    """Data and model of a run.

    config: the run's options; sources: its data by the part they play ("train", "test", ...); vlm: the model, or None
    where neither images nor prompts have to be encoded; device: where the adapter computes; logit_scale,
    logit_scale_from: the multiplier s, and what says so.
    """

    config: RunConfig
    sources: Mapping[str, Source]
    vlm: VisionLanguageModel | None
    device: torch.device
    logit_scale: float
    logit_scale_from: str

    @property
    def model(self) -> VisionLanguageModel:
        """The model, where one is needed. Raises UserError where the run has none."""
        if self.vlm is None:
            raise UserError("data must be images to be encoded by a model, got feature files")
        return self.vlm

    def class_names(self, source: Source) -> tuple[str, ...]:
        """Names of a source's classes, in label order."""
        if self.vlm is not None and self.config.text.text_features is None:
            # This comes before the names are asked for, because no names make this model's prompts fit other features.
            check_width(source.width, self.vlm.embed_dim, f"data features:{source.path}")
        return class_names_of(source, self.config.text)

    def features(self, source: Source, *, title: str, limit: int | None = None, cached: bool = True) -> Features:
        """Centre-view features of a source, or of at most limit of its images, unit norm, on the CPU.

        cached: see encode_images.
        """
        chosen = source.limited(limit)
        if (views := chosen.views()) is not None:
            return Features(views[:, 0], chosen.labels, chosen.ids)
        return encode_images(chosen.samples, self.model, title=title, workers=self.config.run.workers, cached=cached)

    def text_features(self, names: Sequence[str], training: Features | None) -> Tensor:
        """T (K, D), unit norm, on the CPU. training: the images whose class means may be asked for."""
        return text_features_of(self.config.text, names, self.vlm, training)

    def problem(self, names: Sequence[str], text_features: Tensor) -> Problem:
        """The same with its classes, and the adapter to start from at their width."""
        if self.vlm is not None and self.vlm.embed_dim != text_features.shape[1]:
            raise UserError(
                f"text_features {self.config.text.text_features} has rows of width {text_features.shape[1]}, model "
                f"{self.vlm.name} makes features of width {self.vlm.embed_dim}"
            )
        adapter = make_adapter(self.config.adapter, text_features.shape[1], self.config.run.seed)
        opened = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Problem(
            **opened, names=tuple(names), text=text_features.to(self.device), adapter=adapter.to(self.device)
        )


@dataclass(frozen=True)
class Problem(Setup):
    """A set-up with its classes.

    names: of the K classes; text: T (K, D), unit norm, on the device; adapter: where the run starts, on the device.
    """

    names: tuple[str, ...]
    text: Tensor
    adapter: RationalAdapter

    def check_width(self, width: int | None, data: str) -> None:
        """As the function of this name, for the text features in use."""
        check_width(width, self.text.shape[-1], data)


def open_sources(specs: Mapping[str, str]) -> dict[str, Source]:
    """The data behind each KIND:PATH, by the part that it plays.

    Raises UserError where one cannot be used, or is of images without classes and not the data to be predicted.
    """
    sources = {}
    for part, spec in specs.items():
        option = "--new-test" if part == "new" else f"--{part.partition(' ')[0]}"
        try:
            source = open_source(spec)
        except UserError as error:
            raise UserError(f"{option} {spec}: {error}") from None
        if part != "data" and not source.has_classes:
            raise UserError(f"{option} must be imagefolder:DIR or features:FILE.npz, which have classes, got {spec}")
        sources[part] = source
    return sources


def check_backend() -> None:
    """Check the backend that RADA_FAST_BACKEND asks for, before anything is encoded.

    Without the variable, this warns where the compiled extension is damaged, as the run is then only slow.

    Raises UserError where the backend cannot be used.
    """
    name = _env.backend_variable() or "auto"
    if name != "auto" and (reason := backends()[name]) != "usable":
        raise UserError(f"RADA_FAST_BACKEND={name}: backend {name!r} cannot be used: {reason}")
    if name == "auto" and (damage := libraries.damage()):
        notices.warn(f"{damage}; until then this runs on plain PyTorch, more slowly")


def open_setup(config: RunConfig, sources: Mapping[str, Source]) -> Setup:
    """The model, where data or prompts need one, beside the data.

    Raises UserError naming the option that cannot be used.
    """
    check_backend()
    images = any(source.holds_images for source in sources.values())
    vlm = None
    if images or config.text.text_features is None:
        vlm = load_vision_language(config.model, config.run)
    device = resolve_device(config.model.device) if vlm is None else vlm.device
    return Setup(config, sources, vlm, device, *logit_scale_of(config.text, vlm, sources.values()))


def logit_scale_of(
    options: ClassOptions, vlm: VisionLanguageModel | None, sources: Iterable[Source]
) -> tuple[float, str]:
    """The multiplier s, and what says so: the option, the model, feature files, or nothing.

    Raises UserError where two of them differ, or a file states what must be a logarithm.
    """
    if options.logit_scale is not None:
        return options.logit_scale, "--logit-scale"
    stated = [] if vlm is None else [(vlm.logit_scale, f"model {vlm.name}")]
    for file in (*sources, text_file(options)):
        if file is not None and file.logit_scale is not None:
            stated.append((file.logit_scale, f"array logit_scale of {file.path}"))
    for value, where in stated:
        if value < LEAST_LOGIT_SCALE and vlm is None:
            raise UserError(
                f"logit_scale must be the multiplier itself, the {where} holds {value:g}, which looks like the "
                f"logarithm that CLIP stores: give --logit-scale {math.exp(value):.6g}, or {value:g} if it is meant"
            )
        if not math.isclose(value, stated[0][0], rel_tol=1e-3):
            raise UserError(
                f"logit_scale must be given, the {stated[0][1]} has {stated[0][0]:g} and the {where} {value:g}"
            )
    if not stated:
        notices.note(
            f"no file states a logit_scale: CLIP's {DEFAULT_LOGIT_SCALE:g} is taken (--logit-scale changes it)"
        )
    return stated[0] if stated else (DEFAULT_LOGIT_SCALE, "default, as nothing states it")


def text_file(options: ClassOptions) -> FeatureFile | None:
    """The file of text features, where one is given. Raises UserError where it is none."""
    given = options.text_features
    if given is None or given == "class-means" or given.startswith("classifier:"):
        return None
    path = given.removeprefix("features:")
    source = read_feature_file(Path(path).expanduser()) if path not in (given, "") else None
    if source is None or source.features.ndim != 2:
        raise UserError(
            "text_features must be class-means, features:FILE.npz with one row a class or classifier:RUN of an fft, "
            f"got {given!r}"
        )
    return source


def resolve_device(name: str) -> torch.device:
    """The device of an option. Raises UserError where there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if _env.has_cuda() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and not _env.has_cuda():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= _env.cuda_device_count():
        raise UserError(f"device {name!r} was asked for, but PyTorch sees {_env.cuda_device_count()} CUDA devices here")
    return device


def load_vision_language(options: ModelOptions, run: RunOptions) -> VisionLanguageModel:
    """The model of the options on its device."""
    device = resolve_device(options.device)
    return load_model(options.model, options.pretrained, device=device, precision=options.precision, seed=run.seed)


def class_names_of(source: Source, options: ClassOptions) -> tuple[str, ...]:
    """Names of a source's classes, in label order."""
    prompts = options.text_features is None
    names = source.class_names
    if names is None:
        return names_of_labels(source.num_classes, options.classes, prompts=prompts, data=source.description)
    return resolve_class_names(names, options.classes, prompts=prompts, where=source.class_names_from)


def text_features_of(
    options: ClassOptions, names: Sequence[str], vlm: VisionLanguageModel | None, training: Features | None
) -> Tensor:
    """T (K, D), unit norm, on the CPU: prompts encoded, given in a file, or the training features' class means.

    The classifier of a run of fft stands for T as it was trained, and is not normalised.
    """
    if options.text_features is None:
        if vlm is None:
            raise UserError(
                "text_features must be class-means or features:FILE.npz where the data are features and no model's "
                "prompts can fit them; or name the --model whose features they are"
            )
        warn_of_unused_classifier(vlm, names)
        templates = resolve_templates(options.templates)
        warn_of_cut_names(vlm, names, templates)
        with progress("encode prompts", len(set(names)) * len(templates)) as advance:
            return class_features(vlm, names, templates, cache_dir=_env.cache_dir() / "text", progress=advance)
    if options.text_features == "class-means":
        if training is None:
            raise UserError("text_features class-means needs training images, which this command has none of")
        means = class_means(training, len(names))
        warn_of_equal_features(names, means)
        return means
    if options.text_features.startswith("classifier:"):
        classifier = read_classifier(Path(options.text_features.partition(":")[2]))
        if len(classifier) != len(names):
            raise UserError(
                f"text_features {options.text_features} holds a classifier of {len(classifier)} classes, "
                f"the data have {len(names)}"
            )
        return classifier
    source = text_file(options)
    assert source is not None
    return given_text_features(source, names)


def warn_of_unused_classifier(vlm: VisionLanguageModel, names: Sequence[str]) -> None:
    """Warn where prompts stand for classes whose classifier was trained together with the image encoder."""
    if vlm.trained is None or vlm.trained.weights is None:
        return
    place = vlm.trained.path
    if len(read_classifier(vlm.trained.weights)) == len(names):
        notices.warn(
            f"the image encoder of {place} was trained with a classifier of as many classes, which prompts replace "
            f"here; --text-features classifier:{place} takes it"
        )


def make_adapter(options: AdapterOptions, embed_dim: int, seed: int) -> RationalAdapter:
    """The adapter to start from: a file's, or a new one whose draws come from the seed alone."""
    if options.adapter is not None:
        adapter = load_adapter(options.adapter)
        if adapter.config.embed_dim != embed_dim:
            raise UserError(
                f"adapter {options.adapter} has width {adapter.config.embed_dim}, the features have {embed_dim}"
            )
        config = options.applied_to(adapter.config, stated=states_configuration(options.adapter))
        return (adapter if config == adapter.config else load_adapter(options.adapter, config)).float()
    config = options.resolve(embed_dim)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, and nothing would put their states back.
        torch.default_generator.manual_seed(seed)
        return RationalAdapter(config)


def check_width(width: int | None, wanted: int, data: str) -> None:
    """Raise UserError where features are not as wide as the text features.

    width: of the data's features, None where a model will make them; wanted: of the text features; data: the option
    and its value, for the message.
    """
    if width not in (None, wanted):
        raise UserError(f"{data} has features of width {width}, the text features have {wanted}")
