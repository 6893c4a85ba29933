"""What eval and predict use of a run of `eft` or `fft`: its head, its classifier and what is inside the encoders."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rada_fast.config.inference import EvalOptions, InspectOptions, PredictOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import AdapterOptions
from rada_fast.data.sources import ImageFolder, Source
from rada_fast.errors import UserError
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.trained_method import StoredMethod, find_method, read_method
from rada_fast.models.vision_language import Model, VisionLanguageModel
from rada_fast.modules import RationalAdapter
from rada_fast.modules.heads import Head, new_head

Options = TypeVar("Options", EvalOptions, InspectOptions, PredictOptions)


@dataclass(frozen=True)
class TrainedMethod:
    """What a method has trained, besides its head and the image encoder.

    stored: the file that it comes from.
    classifier: the classifier (K, D) in place of the text features, on the device, or None.
    tuning: what is inside the encoders, or None.
    """

    stored: StoredMethod
    classifier: Tensor | None
    tuning: EncoderTuning | None

    def find_rows(self, source: Source, names: Sequence[str]) -> list[tuple[int, ...]] | None:
        """Return the rows of the classifier that each class of some data stands for, or None if a class has none.

        The folder and the name of a class tell which row is its own, or the name alone. A class of ObjectNet can be
        several classes of ImageNet, and two classes of ImageNet can have one name.

        source: the data; names: the names of their classes.
        """
        own, folders = self.stored.config.class_names or (), self.stored.config.class_folders
        if tuple(names) == own:
            return [(row,) for row in range(len(own))]
        if isinstance(source, ImageFolder) and folders is not None:
            row_of = {folder: row for row, folder in enumerate(folders)}
            groups = [tuple(row_of[key] for key in keys if key in row_of) for keys in source.equal_classes()]
            pairs = zip(groups, names, strict=True)
            if all(group and (source.counts_as is not None or own[group[0]] == name) for group, name in pairs):
                return groups
        count = Counter(own)
        if len(set(names)) < len(names) or any(count[name] != 1 for name in names):
            return None
        return [(own.index(name),) for name in names]

    def rows_of(self, source: Source, names: Sequence[str], data: str) -> list[tuple[int, ...]]:
        """Return the rows that find_rows finds. data: the option that names the data, for messages.

        Raises UserError if a class has no row of its own.
        """
        if (found := self.find_rows(source, names)) is not None:
            return found
        own, path = self.stored.config.class_names or (), self.stored.path
        missing = [name for name in names if name not in own]
        if not missing:
            raise UserError(f"{data} has other classes than the classifier of {path}, and some have the same name")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        adapter = self.stored.adapter_file()
        advice = "" if adapter is None else f"; to use its adapter alone, give --adapter {adapter}"
        raise UserError(
            f"{data} has the class {missing[0]!r}{more}, for which the classifier of {path} has no row{advice}"
        )


def with_trained_weights(options: Options) -> tuple[Options, StoredMethod | None]:
    """Read the method that the option --adapter names. Returns the options that load its encoder, and the method.

    Without such a method the options stay as they are, and the method is None.
    """
    path = find_method(options.adapter.adapter)
    if path is None:
        return options, None
    stored = read_method(path)
    if isinstance(options, PredictOptions) and options.ttt:
        file = stored.adapter_file()
        advice = "leave out --ttt" if file is None else f"give --adapter {file}, which is its rational adapter alone"
        raise UserError(f"--ttt adapts a rational adapter, and {path} holds more or other weights: {advice}")
    adapter = AdapterOptions(adapter=options.adapter.adapter)
    if stored.config.head != "rational" and options.adapter != adapter:
        raise UserError(f"method {stored.config.method} of {path} has no rational adapter: give --adapter alone")
    if stored.has_encoder:
        options = dataclasses.replace(options, model=dataclasses.replace(options.model, pretrained=str(path)))
    if (file := stored.adapter_file()) is not None:
        options = dataclasses.replace(options, adapter=dataclasses.replace(options.adapter, adapter=str(file)))
    return options, stored


def head_of_method(stored: StoredMethod, adapter: RationalAdapter) -> Head:
    """Make the head of a method with its trained weights. adapter: its rational adapter, if it has one.

    Raises UserError if the weights do not fit the head.
    """
    config = stored.config
    if config.head == "rational":
        return adapter
    sizes = RationalAdapter(AdapterConfig.official(config.embed_dim, num_heads=config.num_heads), device="meta")
    head = new_head(config.head, sizes, seed=0, ratio=config.feature_ratio)
    try:
        head.load_state_dict(stored.part("head."))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {stored.path} does not fit its method {config.method}: {reason}") from None
    return head.requires_grad_(False)


def trained_method(stored: StoredMethod, model: Model, width: int, device: torch.device) -> TrainedMethod:
    """Make the other parts of a method. width: the width of the features. Raises UserError if they do not fit."""
    if stored.config.embed_dim != width:
        raise UserError(
            f"adapter {stored.path} was trained on features of width {stored.config.embed_dim}, these have {width}"
        )
    tuning = None
    if stored.config.kind is not None:
        if not isinstance(model, VisionLanguageModel):
            raise UserError(f"method {stored.config.method} of {stored.path} needs prompts: leave out --text-features")
        tuning = stored.tuning(model)
    classifier = stored.classifier()
    return TrainedMethod(stored, None if classifier is None else classifier.to(device), tuning)
