"""The set-up of a run: the data, the model and the adapter that its options name, opened and checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rada_fast import _env
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.inference import EvalOptions, InspectOptions, PredictOptions
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.config.options import AdapterOptions, RunOptions
from rada_fast.data.open import open_source, open_text_file
from rada_fast.data.sources import FeatureFile, Source
from rada_fast.errors import UserError
from rada_fast.extension import libraries
from rada_fast.loops.trained import TrainedMethod, head_of_method, trained_method
from rada_fast.models.trained_method import METHOD_FILE, StoredMethod, find_method
from rada_fast.models.vision_language import Model, open_model
from rada_fast.modules import RationalAdapter
from rada_fast.modules.checkpoint import read_adapter
from rada_fast.modules.heads import Head, new_head
from rada_fast.modules.rational_adapter import new_adapter
from rada_fast.ops import backends
from rada_fast.reports.summary import RunFacts
from rada_fast.runs.origin import origin_of
from rada_fast.runs.sinks import import_sink
from rada_fast.system import neighbours, notices, patience, ranks

LoopOptions = TTTOptions | EFTOptions | FFTOptions | EvalOptions | InspectOptions | PredictOptions

DEFAULT_LOGIT_SCALE = 100.0
"""CLIP's multiplier after training, for feature files that come without a model."""
MIN_LOGIT_SCALE = 5.0
"""A smaller multiplier is probably a logarithm: CLIP's multiplier is 100, and the logarithm of it 4.6052."""


@dataclass(frozen=True)
class DataAndModel:
    """The data and the model of a run, before the text features of its classes are known.

    sources: the data, by part ("train", "test", ...).
    option_values: the option that names each of them with its value, for messages.
    model: the model, or an AbsentModel if nothing has to be encoded.
    text_file: the file of text features, if the options name one.
    logit_scale: the multiplier s.
    logit_scale_from: the option, the model or the file that the multiplier comes from.
    """

    sources: Mapping[str, Source]
    option_values: Mapping[str, str]
    model: Model
    text_file: FeatureFile | None
    logit_scale: float
    logit_scale_from: str


@dataclass(frozen=True)
class Setup:
    """The complete set-up of a run.

    command: the name of the command.
    options: the options of the command.
    sources, model, logit_scale, logit_scale_from: see DataAndModel.
    names: the names of the K classes, in label order.
    text: the text features T (K, D) on the device.
    adapter: the rational adapter with which the run starts, if its method has one.
    head: what computes the logits: the adapter, or the head of another method.
    trained: what else a trained method has, in eval and predict.
    """

    command: str
    options: LoopOptions
    sources: Mapping[str, Source]
    model: Model
    logit_scale: float
    logit_scale_from: str
    names: tuple[str, ...]
    text: Tensor
    adapter: RationalAdapter
    head: Head
    trained: TrainedMethod | None = None

    @property
    def device(self) -> torch.device:
        """The device on which the adapter computes."""
        return self.model.device

    def facts(self) -> RunFacts:
        """Return the facts about the set-up that the summary of the run contains."""
        return RunFacts(
            self.command,
            dataclasses.asdict(self.options),
            self.head.config,
            self.model.facts(),
            {"value": self.logit_scale, "from": self.logit_scale_from},
            origin_of(self.options.adapter.adapter),
        )


def open_data_and_model(
    options: LoopOptions, specs: Mapping[str, str], *, only_images: str | None = None
) -> DataAndModel:
    """Open the data and, where images or prompts have to be encoded, the model.

    options: the options of the command.
    specs: the data as KIND:PATH, by part ("train", "test", ...).
    only_images: the message of the error if some data are not images, or None if the command also accepts features.

    Raises UserError naming the option that cannot be used.
    """
    check_backend()
    if options.run.profile and not isinstance(options, TTTOptions | EFTOptions | FFTOptions):
        notices.warn("--profile has a use in ttt, eft and fft alone")
    patience.set_limit(options.run.timeout)
    for name in options.run.log:
        import_sink(name)  # before anything is encoded
    option_values = {part: f"{_option_of(part)} {spec}" for part, spec in specs.items()}
    sources = open_sources(specs)
    if only_images is not None and not all(source.holds_images for source in sources.values()):
        raise UserError(only_images)
    text_file = open_text_file(options.text.text_features)
    prompts = options.text.text_features is None
    needed = prompts or any(source.holds_images for source in sources.values())
    model = open_model(options.model, needed=needed, seed=options.run.seed)
    meet_neighbours(options.run, model.device)
    stated = [model.stated_scale()]
    stated += [_stated_scale(file) for file in (*sources.values(), *([text_file] if text_file is not None else []))]
    scale, origin = logit_scale_of(options.text.logit_scale, stated)
    if prompts:
        # The widths are checked before the names, because no names could make this model's prompts fit other features.
        for part, source in sources.items():
            check_width(source.width, model.loaded().embed_dim, option_values[part])
    return DataAndModel(sources, option_values, model, text_file, scale, origin)


def meet_neighbours(run: RunOptions, device: torch.device) -> None:
    """Tell the user of other runs on the same device, or raise UserError if the options ask for that.

    run: the options of the run; device: the device that it computes on.
    """
    if device.type == "cpu" and not ranks.current().first:
        return  # the ranks of one run divide the cores among themselves
    index = "" if device.type == "cpu" else f":{_env.current_cuda_device() if device.index is None else device.index}"
    name = device.type + index
    if found := neighbours.announce(name, run.output, exclusive=run.exclusive):
        notices.note(neighbours.advice(found, name))


def open_setup(
    command: str,
    options: LoopOptions,
    opened: DataAndModel,
    names: Sequence[str],
    text: Tensor,
    stored: StoredMethod | None = None,
) -> Setup:
    """Complete the set-up of a run with its classes and its adapter.

    command: the name of the command.
    options: the options of the command.
    opened: the data and the model.
    names: the names of the K classes.
    text: the text features T (K, D) on the CPU.
    stored: the trained method that eval and predict use, or None.

    Raises UserError if the widths of the data, of the model and of the adapter differ, or a method does not fit them.
    """
    opened.model.check_width(text.shape[1], f"text_features {options.text.text_features} has rows")
    for part, source in opened.sources.items():
        check_width(source.width, text.shape[1], opened.option_values[part])
    device = opened.model.device
    # The processors of two machines may round in different ways.
    text = ranks.current().broadcast_tensor(text)
    trained = None if stored is None else trained_method(stored, opened.model, text.shape[1], device)
    from_file = stored is None or stored.config.head == "rational"
    adapter_options = options.adapter if from_file else AdapterOptions()
    adapter = make_adapter(adapter_options, text.shape[1], options.run.seed).to(device)
    head = head_of(options, adapter) if stored is None else head_of_method(stored, adapter)
    if stored is None:
        _warn_of_unused_method(options)
    warn_of_other_model(origin_of(options.adapter.adapter), options)
    return Setup(
        command,
        options,
        opened.sources,
        opened.model,
        opened.logit_scale,
        opened.logit_scale_from,
        tuple(names),
        text.to(device),
        adapter,
        head.to(device),
        trained,
    )


def head_of(options: LoopOptions, adapter: RationalAdapter) -> Head:
    """Make the head of the method that the options name, which is the adapter in test-time training and RAda."""
    match options:
        case EFTOptions():
            return new_head(
                EFT_METHODS[options.method].head, adapter, seed=options.run.seed, ratio=options.tuning.feature_ratio
            )
        case FFTOptions():
            return new_head(
                FFT_METHODS[options.method].head, adapter, seed=options.run.seed, ratio=options.feature_ratio
            )
    return adapter


def warn_of_other_model(origin: Mapping[str, Any] | None, options: LoopOptions) -> None:
    """Warn if an adapter was trained with another model than the one that is used. origin: see origin_of."""
    own = options.model
    if origin is None or origin["model"]["model"] in (None, own.model):
        return
    trained = origin["model"]
    given = f"--model {trained['model']}" + (f" --pretrained {trained['pretrained']}" if trained["pretrained"] else "")
    notices.warn(f"adapter {options.adapter.adapter} was trained with {given}, and is used with --model {own.model}")


def _warn_of_unused_method(options: LoopOptions) -> None:
    """Warn if the run of an adapter has also trained something inside the encoders, which is not used."""
    path = find_method(options.adapter.adapter)
    if path is not None and path.name == METHOD_FILE:
        notices.warn(
            f"adapter {options.adapter.adapter}: this command uses the rational adapter alone, not what the run has "
            f"trained inside the encoders ({path})"
        )


def check_backend() -> None:
    """Check the backend that RADA_FAST_BACKEND asks for, before anything is encoded.

    If the variable is not set and the compiled extension is damaged, this only warns, because the run is merely slower.

    Raises UserError if the backend cannot be used.
    """
    name = _env.backend_variable() or "auto"
    if name != "auto" and (reason := backends()[name]) != "usable":
        raise UserError(f"RADA_FAST_BACKEND={name}: backend {name!r} cannot be used: {reason}")
    if name == "auto" and (damage := libraries.damage()):
        notices.warn(f"{damage}; until then this runs on plain PyTorch, more slowly")


def open_sources(specs: Mapping[str, str]) -> dict[str, Source]:
    """Open the data that each KIND:PATH names. Returns them by part.

    specs: the data as KIND:PATH, by part ("train", "test", ...).

    Raises UserError if some data cannot be used. Images without classes can be used by ttt alone (the part "data").
    """
    sources = {}
    for part, spec in specs.items():
        option = _option_of(part)
        try:
            source = open_source(spec, "train" if part == "train" else "test")
        except UserError as error:
            raise UserError(f"{option} {spec}: {error}") from None
        if part != "data" and not source.has_classes:
            raise UserError(
                f"{option} must name data with classes, such as imagefolder:DIR, got {spec}, which has none"
            )
        sources[part] = source
    return sources


def _option_of(part: str) -> str:
    """Return the option that names the data of a part."""
    return "--new-test" if part == "new" else f"--{part.partition(' ')[0]}"


def _stated_scale(source: Source) -> tuple[float, str] | None:
    """Return the multiplier that data state, with the name of the array for messages, or None if they state none."""
    return None if source.logit_scale is None else (source.logit_scale, f"array logit_scale of {source.path}")


def logit_scale_of(option: float | None, stated: Sequence[tuple[float, str] | None]) -> tuple[float, str]:
    """Choose the multiplier s. Returns it with the option, the model or the file that it comes from.

    option: the value of the option --logit-scale, or None.
    stated: the value of the model and then that of each file, each with its name for messages, or None without a value.

    Raises UserError if the option is not given and two values differ, or a file without a model seems to state the
    logarithm of the multiplier.
    """
    if option is not None:
        return option, "--logit-scale"
    of_model, *_ = stated
    found = [one for one in stated if one is not None]
    for value, where in found:
        if value < MIN_LOGIT_SCALE and of_model is None:
            raise UserError(
                f"logit_scale must be the multiplier itself, the {where} holds {value:g}, which looks like the "
                f"logarithm that CLIP stores: give --logit-scale {math.exp(value):.6g}, or {value:g} if it is meant"
            )
        if not math.isclose(value, found[0][0], rel_tol=1e-3):
            raise UserError(
                f"logit_scale must be given, the {found[0][1]} has {found[0][0]:g} and the {where} {value:g}"
            )
    if not found:
        notices.note(
            f"no file states a logit_scale: CLIP's {DEFAULT_LOGIT_SCALE:g} is taken (--logit-scale changes it)"
        )
    return found[0] if found else (DEFAULT_LOGIT_SCALE, "default, as nothing states it")


def make_adapter(options: AdapterOptions, embed_dim: int, seed: int) -> RationalAdapter:
    """Read the adapter that the options name, or make a new one whose random weights depend on the seed alone."""
    if options.adapter is not None:
        stored = read_adapter(options.adapter)
        own = stored.config()
        if own.embed_dim != embed_dim:
            raise UserError(f"adapter {options.adapter} has width {own.embed_dim}, the features have {embed_dim}")
        config = options.applied_to(own, stated=stored.stated is not None)
        return stored.build(config).float()
    return new_adapter(options.resolve(embed_dim), seed)


def check_width(width: int | None, expected: int, data: str) -> None:
    """Raise UserError if features are not as wide as the text features.

    width: the width of the features of the data, or None if a model will compute them.
    expected: the width of the text features.
    data: the option that names the data, with its value, for the message.
    """
    if width not in (None, expected):
        raise UserError(f"{data} has features of width {width}, the text features have {expected}")
