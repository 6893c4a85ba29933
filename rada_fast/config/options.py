"""Define the options that several commands share: those of the model, the classes, the adapter and the run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from rada_fast.config.checks import (
    MAX_LAYERS,
    MAX_SEED,
    MAX_WORKERS,
    check_choices,
    check_integer,
    check_paths,
    check_positive,
    check_share,
    check_text,
    expand_home,
)
from rada_fast.config.method import (
    QUERY_KINDS,
    AdapterConfig,
    MaskFunction,
    QueryKind,
)
from rada_fast.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]
SinkName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class ModelOptions:
    """These options choose the vision-language model."""

    model: str = "embedded"
    """An open_clip model's name, such as ViT-B-16-quickgelu; "embedded", the small CLIP that is shipped; or files:
    openclip:DIR, transformers:DIR (CLIP, SigLIP, ALIGN) or openai:FILE.pt."""
    pretrained: str | None = None
    """For a name of open_clip: a hub tag such as openai, a local weights file (OpenAI's archives too), or "random"
    to try a command without weights. For any model: the output folder of an fft, for the encoder that it trained."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    precision: Precision = "float32"
    """Arithmetic of the encoders; the adapter, its gradients and its optimiser stay in float32."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "model", "pretrained")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"device must be auto, cpu or cuda[:N], got {self.device!r}")


@dataclass(frozen=True)
class ClassOptions:
    """These options choose the classes and their text features."""

    classes: str | None = None
    """Class names: a text file (one name per line, or a table with a number or folder beside it) or JSON. Default: the
    folders' names; ImageNet's folders are recognised."""
    templates: tuple[str, ...] = ("photo",)
    """One or more of these, whose prompts are averaged: a template with {}; photo, simple (7) or openai (80); a CoOp
    data set's name such as dtd, or coop for that of the data; a file of templates; a JSON file with sentences for each
    class, {"cat": ["A cat has ...", ...]}."""
    text_features: str | None = None
    """Use these as T instead of encoding prompts: features:FILE.npz with one row for each class; classifier:RUN, the
    classifier that an fft in that folder has trained; or "class-means", the mean of each class's training features."""
    logit_scale: float | None = None
    """Multiplier s of the logits. Default: the model's; without a model, the array logit_scale of the feature files, or
    CLIP's 100."""

    def __post_init__(self) -> None:
        if not self.templates or not isinstance(self.templates, tuple):
            raise UserError(f"templates must name at least one template, as a tuple of texts, got {self.templates!r}")
        for template in self.templates:
            check_text("templates", template)
            if not template.isascii() and "{" in template and template.encode("utf-8", "replace").decode() != template:
                raise UserError(f"templates must be text in UTF-8, got {template!r}")
        names = (one if "{" in one else expand_home("templates", one) for one in self.templates)
        object.__setattr__(self, "templates", tuple(names))
        check_paths(self, "classes", "text_features")
        if self.logit_scale is not None:
            check_positive("logit_scale", self.logit_scale)


@dataclass(frozen=True)
class AdapterOptions:
    """These options choose the rational adapter."""

    preset: Literal["official", "paper"] | None = None
    """The published code's arithmetic, which is the default, or the paper's."""
    temperature: float | None = None
    """Divides the attention scores. Default: 1."""
    num_heads: int | None = None
    """Attention heads. Default: the preset's (official 8, paper 1)."""
    queries: tuple[QueryKind, ...] = ()
    """Query kinds in use. Default: all three."""
    num_layers: int | None = None
    """Attention layers. Default: 1."""
    mask_function: MaskFunction | None = None
    """attention, the default, or mlp: a two-layer MLP in its place (Table 4)."""
    adapter: str | None = None
    """Start from this adapter: a safetensors file of this package, a published checkpoint, or a run's folder. It
    decides all of the above, except --temperature and --num-heads where it is a published checkpoint, which does not
    hold them; an option that contradicts it is refused. In eval and predict, the folder of an eft or fft stands for all
    that it trained: prompts, adapters inside the encoders, other heads, classifier and image encoder."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.num_heads is not None:
            check_integer("num_heads", self.num_heads, 1)
        if self.num_layers is not None:
            check_integer("num_layers", self.num_layers, 1, MAX_LAYERS)
        # Values that are wrong at any width are refused before a model is loaded.
        self.resolve(self.num_heads or 8)
        check_paths(self, "adapter")

    def _given(self) -> dict[str, Any]:
        """Return the fields of the adapter's configuration that were given, without the preset."""
        names = ("temperature", "num_heads", "queries", "num_layers", "mask_function")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}

    def resolve(self, embed_dim: int) -> AdapterConfig:
        """Return the full configuration for a model's width. Raises ValueError naming the field that does not fit."""
        make = AdapterConfig.paper if self.preset == "paper" else AdapterConfig.official
        return make(embed_dim, **self._given())

    def applied_to(self, config: AdapterConfig, *, stated: bool) -> AdapterConfig:
        """Return the configuration of an adapter's file, completed by the options for what the file does not hold.

        config: the configuration of the file; stated: whether the file holds all of it. A published checkpoint holds
        neither the temperature nor the number of heads; config then has the published code's values for them.

        Raises UserError naming an option that contradicts the file.
        """
        if self.preset is not None:
            wanted = (AdapterConfig.paper if self.preset == "paper" else AdapterConfig.official)(8)
            for name in ("softmax", "input_scale", "mask_activation"):
                if getattr(wanted, name) != (own := getattr(config, name)):
                    raise UserError(
                        f"preset must fit adapter {self.adapter}, whose {name} is {own!r}, or be left out; "
                        f"got {self.preset!r}"
                    )
        given = self._given()
        if "queries" in given:
            given["queries"] = tuple(kind for kind in QUERY_KINDS if kind in given["queries"])
        for name, value in given.items():
            own = getattr(config, name)
            if value != own and (stated or name not in ("temperature", "num_heads")):
                raise UserError(
                    f"{name} must be {own!r}, as adapter {self.adapter} has it, or be left out; got {value!r}"
                )
        return dataclasses.replace(config, **given)


@dataclass(frozen=True)
class TuningOptions:
    """These options choose what the methods of `eft` other than rada train."""

    context_tokens: int = 4
    """Learned tokens: words of the prompt in coop, prompt, maple and rada+prompt, and tokens of the image in the last
    three (4, as "a photo of a" has; MaPLe's publication has 2)."""
    prompt_depth: int = 9
    """Blocks of both encoders that get learned tokens of their own, from the first on, in prompt, maple
    and rada+prompt (published: 9)."""
    adapter_depth: int = 8
    """Blocks of both encoders with an adapter behind them, up to the last, in adapter and rada+adapter."""
    adapter_width: int = 32
    """Width of these adapters' bottleneck."""
    feature_ratio: float = 0.2
    """The share of the adapted feature in clip-adapter (published: 0.2)."""

    def __post_init__(self) -> None:
        for name in ("context_tokens", "prompt_depth", "adapter_depth", "adapter_width"):
            check_integer(name, getattr(self, name), 1)
        check_share("feature_ratio", self.feature_ratio)


@dataclass(frozen=True)
class RunOptions:
    """These options say where the results go and how the run behaves."""

    output: str = "results"
    """Folder for the results. Started again with it, an interrupted run goes on where it stopped."""
    seed: int = 0
    """Every random draw comes from (seed, image id), so order, workers and interruptions change nothing."""
    workers: int = 0
    """Processes, in ttt threads, that read images and make views; with 0 this is done in turn with the rest."""
    limit: int | None = None
    """Use only this many images, spread over the classes."""
    overwrite: bool = False
    """Remove the results of another run from the output folder."""
    allow_unreadable: int = 0
    """Exit with status 3 when more images than this could not be read; every such image is recorded either way."""
    allow_chance: bool = False
    """Go on although the zero-shot answers are no better than guesses. Otherwise such a run, if it has 100 images or
    more, stops before it begins, and says the likely cause, such as folders and class names in different orders."""
    timeout: float = 60.0
    """Seconds that reading one image may take. One that takes longer, on a disk that hangs or in a decoder that never
    ends, is recorded as unreadable, and the run goes on."""
    exclusive: bool = False
    """Refuse to start while another run of this user computes on the same device. Without it, a line tells of the
    other run and how to divide the cores."""
    profile: bool = False
    """Trace a few steps of the run (groups of images in test-time training) with PyTorch's profiler. The trace,
    trace.json.gz, and a table of the operators, trace.txt, are in the output folder. The results stay the same."""
    json: bool = False
    """Print the summary as JSON on standard output instead of a table."""
    log: tuple[SinkName, ...] = ()
    """Also send the numbers of epochs and results to these: tensorboard (event files in the output folder), wandb."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "output")
        check_integer("workers", self.workers, 0, MAX_WORKERS)
        check_integer("seed", self.seed, 0, MAX_SEED)
        if self.limit is not None:
            check_integer("limit", self.limit, 1)
        check_integer("allow_unreadable", self.allow_unreadable, 0)
        check_positive("timeout", self.timeout)
