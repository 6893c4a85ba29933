"""The files in which `eft` and `fft` store what a method has trained, with the method's configuration in the header.

`eval` and `predict` read them. No code in these files is executed, and the sizes that a header states are compared with
the tensors before anything of these sizes is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rada_fast.config.methods import EFT_METHODS, FFT_METHODS, HeadName, TuningName
from rada_fast.config.options import TuningOptions
from rada_fast.errors import UserError
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.trained import CLASSIFIER, TEXT, VISUAL, WEIGHTS_FILES
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.models.weights import one_line

FORMAT = "rada_fast.method.v1"
METHOD_FILE, ADAPTER_FILE = "method.safetensors", "adapter.safetensors"
"""The files in which eft stores a method, and the rational adapter if the method has one."""
HEAD, ENCODERS = "head.", "encoders."
"""How the names of tensors begin that belong to the head, or to what was trained inside the encoders."""
MAX_SIZE = 2**14
"""The largest width, number of tokens or number of heads that a header may state."""


@dataclass(frozen=True)
class MethodConfig:
    """What has to be known about a trained method to compute with it again.

    command: "eft" or "fft".
    method: the name of its row in config/methods.py.
    model: the model that it was trained with, as --model names it, or None where it was trained on features alone.
    embed_dim: the width D of the features.
    num_heads: the heads of an attention that is not the rational adapter's.
    feature_ratio: the share of the adapted feature in clip-adapter.
    template: the prompt of the classes, where something is trained inside the encoders.
    tuning: the options of what is trained there, likewise.
    class_names: the names of the K rows of the classifier, in their order, where there is a classifier.
    class_folders: the folders of these classes, likewise, where the training data were images.
    """

    command: str
    method: str
    model: str | None
    embed_dim: int
    num_heads: int
    feature_ratio: float
    template: str | None = None
    tuning: TuningOptions | None = None
    class_names: tuple[str, ...] | None = None
    class_folders: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        methods: dict[str, Collection[str]] = {"eft": EFT_METHODS, "fft": FFT_METHODS}
        if self.method not in methods.get(self.command, ()):
            raise UserError(f"there is no method {self.method!r} of {self.command!r}")
        sizes = {"embed_dim": self.embed_dim, "num_heads": self.num_heads}
        if self.tuning is not None:
            sizes |= {name: value for name, value in vars(self.tuning).items() if name != "feature_ratio"}
        for name, value in sizes.items():
            if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise UserError(f"{name} must be from 1 to {MAX_SIZE}, got {str(value)[:40]}")
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        if not isinstance(self.feature_ratio, int | float) or not 0 <= self.feature_ratio <= 1:
            raise UserError(f"feature_ratio must be from 0 to 1, got {str(self.feature_ratio)[:40]}")
        if (self.kind is None) != (self.tuning is None) or (self.kind is None) != (self.template is None):
            raise UserError(f"the options of the encoders' tuning do not fit the method {self.method}")
        names, folders = self.class_names or (), self.class_folders or ()
        if folders and len(folders) != len(names):
            raise UserError(f"there are {len(folders)} class folders and {len(names)} class names")
        texts = [text for text in (self.model, self.template, *names, *folders) if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError("a name must be a text")

    @property
    def head(self) -> HeadName:
        """The name of the head that computes the logits."""
        return EFT_METHODS[self.method].head if self.command == "eft" else FFT_METHODS[self.method].head  # type: ignore[index]

    @property
    def kind(self) -> TuningName | None:
        """The name of what is trained inside the encoders, or None."""
        return EFT_METHODS[self.method].tuning if self.command == "eft" else None  # type: ignore[index]

    def metadata(self) -> dict[str, str]:
        """Return the header of a file of this method."""
        return {"format": FORMAT, "config": json.dumps(dataclasses.asdict(self))}


@dataclass(frozen=True)
class StoredMethod:
    """The contents of a method's file, but for the encoders in it, which --pretrained reads.

    path: the file; config: its configuration; tensors: its tensors by name; has_encoder, has_text_encoder: whether the
    file holds an image encoder, and a text encoder; fingerprint: a hash of all of this, without the encoders.
    """

    path: Path
    config: MethodConfig
    tensors: Mapping[str, Tensor]
    has_encoder: bool
    has_text_encoder: bool
    fingerprint: str

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, by their names without it."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def adapter_file(self) -> Path | None:
        """Return the file beside this one that holds the method's rational adapter, or None if the method has none."""
        if self.config.head != "rational":
            return None
        name = ADAPTER_FILE if self.config.command == "eft" else self.path.name.replace("-model.", "-adapter.")
        path = self.path.with_name(name)
        if path == self.path or not path.is_file():
            raise UserError(f"adapter {self.path} needs the rational adapter {name} beside it, which does not exist")
        return path

    def classifier(self) -> Tensor | None:
        """Return the classifier (K, D), or None if the method has none. Raises UserError if it is no such matrix."""
        names, weight = self.config.class_names, self.tensors.get(CLASSIFIER)
        if names is None and weight is None:
            return None
        if names is None or weight is None or weight.shape != (len(names), self.config.embed_dim):
            raise UserError(f"adapter {self.path} must hold a row of {CLASSIFIER} for each of its class names")
        return weight.float()

    def tuning(self, vlm: VisionLanguageModel) -> EncoderTuning | None:
        """Make what was trained inside the encoders of a model, or return None if the method trains nothing there.

        Raises UserError if it does not fit the model.
        """
        config = self.config
        if config.kind is None or config.tuning is None or config.template is None:
            return None
        if config.model != vlm.name:
            raise UserError(
                f"adapter {self.path} was trained inside the encoders of the model {config.model}: give --model "
                f"{config.model}, got {vlm.name}"
            )
        # The sizes are compared before a module of these sizes is made.
        if config.kind == "adapters":
            place, size = "image_adapters.0.0.weight", config.tuning.adapter_width
        else:
            place, size = "context", config.tuning.context_tokens
        found = self.tensors.get(ENCODERS + place)
        if found is None or found.ndim != 2 or len(found) != size:
            raise UserError(f"adapter {self.path} must hold {ENCODERS}{place} with {size} rows, as its header says")
        tuning = EncoderTuning(config.kind, vlm, config.template, config.tuning, seed=0)
        try:
            tuning.load_state_dict(self.part(ENCODERS))
        except RuntimeError as error:
            raise UserError(f"adapter {self.path} does not fit the model {vlm.name}: {one_line(error)}") from None
        return tuning.requires_grad_(False)


def find_method(adapter: str | None) -> Path | None:
    """Return the file of a method that the option --adapter names, or None if it names a rational adapter alone.

    adapter: a run's folder, in which the file of the last stage of fft counts, or a file.
    """
    if adapter is None:
        return None
    path = Path(adapter).expanduser()
    if path.is_dir():
        return next((path / name for name in (METHOD_FILE, *WEIGHTS_FILES) if (path / name).is_file()), None)
    try:
        with safe_open(path, framework="pt") as file:
            names, header = list(file.keys()), file.metadata() or {}
    except Exception:  # whatever is wrong with it, the reader of adapters says it
        return None
    is_method = str(header.get("format")).startswith("rada_fast.method.") or CLASSIFIER in names
    return path if is_method or any(name.startswith(ENCODERS) for name in names) else None


def read_method(path: Path) -> StoredMethod:
    """Read the file of a method. Raises UserError if it is damaged or does not say its configuration."""
    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata() or {}, sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if not name.startswith((VISUAL, TEXT))}
    except Exception as error:  # not only safetensors' own: a size may overflow
        raise UserError(f"adapter {path} is not readable safetensors: {one_line(error)}") from None
    if header.get("format") != FORMAT:
        found = f"has the format {header['format'][:80]!r}" if "format" in header else "does not say its configuration"
        raise UserError(f"adapter {path} {found}, this version reads {FORMAT!r}")
    config = _config(path, header.get("config", ""))
    digest = hashlib.sha256(header["config"].encode())
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"adapter {path}: {name[:80]} must hold finite floating-point numbers")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    has_encoder, has_text_encoder = (any(name.startswith(prefix) for name in names) for prefix in (VISUAL, TEXT))
    return StoredMethod(path, config, tensors, has_encoder, has_text_encoder, digest.hexdigest()[:16])


def _config(path: Path, text: str) -> MethodConfig:
    try:
        values: dict[str, Any] = json.loads(text)
        if values.get("tuning") is not None:
            values["tuning"] = TuningOptions(**values["tuning"])
        for name in ("class_names", "class_folders"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return MethodConfig(**values)
    except UserError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except (ValueError, TypeError, AttributeError) as error:
        reason = one_line(error)
    raise UserError(f"adapter {path} has an unusable configuration: {reason}")
