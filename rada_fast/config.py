"""Frozen configurations: of the adapter, of a test-time episode and of each loop. Defaults say where they are from."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from rada_fast.checks import (
    MOST_LAYERS,
    MOST_SEED,
    MOST_WORKERS,
    check_choice,
    check_paths,
    check_positive,
    check_text,
    check_whole,
)
from rada_fast.errors import UserError

Softmax = Literal["matrix", "row"]
InputScale = Literal["logit", "none"]
MaskActivation = Literal["relu", "none"]
MaskFunction = Literal["attention", "mlp"]
QueryKind = Literal["image", "text", "rational"]
MaskPenalty = Literal["l2", "l1", "linf"]
TTTLoss = Literal["mean", "marginal"]
OptimizerName = Literal["adamw", "adam", "sgd"]
Precision = Literal["float32", "bfloat16", "float16"]
ViewKind = Literal["crop", "augmix"]
TrainViews = Literal["center", "crop"]
Protocol = Literal["base-to-new", "all"]
Schedule = Literal["cosine", "constant"]
Stages = Literal["both", "rada"]

QUERY_KINDS: tuple[QueryKind, ...] = ("image", "text", "rational")
MASK_PENALTIES: tuple[MaskPenalty, ...] = ("l2", "l1", "linf")


@dataclass(frozen=True)
class AdapterConfig:
    """The rational adapter's arithmetic (RAda, arXiv:2507.15480, Eq. 6 and 16, and the published code's variants).

    embed_dim: width D of the vision-language model's joint embedding.
    num_heads: heads H of the attention over classes; must divide embed_dim.
    softmax: "row" normalises each query's scores over the classes (Eq. 6); "matrix" normalises a head's whole K x K
        score matrix at once and multiplies by K (published code).
    temperature: divides the scores, next to the square root of the head width.
    input_scale: "logit" feeds sqrt(s) f, sqrt(s) T and s R to the projections (published code); "none" feeds f, T, R.
    input_scale_factor: multiplies s inside input_scale="logit" only; 4 in one published variant, else 1.
    mask_activation: "relu" clips the mask 1 + A at zero (published code); "none" leaves it (paper).
    bias: whether the projections have biases.
    queries: the query kinds in use, any non-empty subset of image, text and rational (Table 4).
    num_layers: attention layers L (Eq. 16, Table 10).
    mask_function: "attention", or "mlp": a two-layer MLP on the scaled rational matrix (Table 4).

    Raises ValueError naming the field when a value is out of range.
    """

    embed_dim: int
    num_heads: int = 8
    softmax: Softmax = "matrix"
    temperature: float = 1.0
    input_scale: InputScale = "logit"
    mask_activation: MaskActivation = "relu"
    bias: bool = True
    queries: tuple[QueryKind, ...] = QUERY_KINDS
    num_layers: int = 1
    mask_function: MaskFunction = "attention"
    input_scale_factor: float = 1.0

    def __post_init__(self) -> None:
        check_whole("embed_dim", self.embed_dim, 1)
        check_whole("num_heads", self.num_heads, 1)
        check_whole("num_layers", self.num_layers, 1)
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        check_choice("softmax", self.softmax, ("matrix", "row"))
        check_choice("input_scale", self.input_scale, ("logit", "none"))
        check_choice("mask_activation", self.mask_activation, ("relu", "none"))
        check_choice("mask_function", self.mask_function, ("attention", "mlp"))
        check_positive("temperature", self.temperature)
        check_positive("input_scale_factor", self.input_scale_factor)
        if not isinstance(self.bias, bool):
            raise UserError(f"bias must be true or false, got {self.bias!r}")
        if not isinstance(self.queries, tuple) or not self.queries:
            raise UserError(f"queries must be a non-empty tuple of {', '.join(QUERY_KINDS)}, got {self.queries!r}")
        for query in self.queries:
            check_choice("queries", query, QUERY_KINDS)
        if len(set(self.queries)) != len(self.queries):
            raise UserError(f"queries must not repeat a kind, got {self.queries!r}")
        # One order everywhere, so that equal sets of queries are equal configurations.
        object.__setattr__(self, "queries", tuple(kind for kind in QUERY_KINDS if kind in self.queries))
        if self.mask_function == "mlp" and self.num_layers != 1:
            raise UserError(f"num_layers must be 1 with mask_function 'mlp', got {self.num_layers}")

    @property
    def head_dim(self) -> int:
        """Width d = D / H of one head."""
        return self.embed_dim // self.num_heads

    @property
    def preset(self) -> str:
        """Name of the preset this equals apart from embed_dim and temperature: "official", "paper" or "custom"."""
        if self.embed_dim % 8 == 0 and self == AdapterConfig.official(self.embed_dim, temperature=self.temperature):
            return "official"
        if self == AdapterConfig.paper(self.embed_dim, temperature=self.temperature):
            return "paper"
        return "custom"

    @classmethod
    def official(cls, embed_dim: int, temperature: float = 1.0, **changes: Any) -> AdapterConfig:
        """The published code's arithmetic: 8 heads, matrix softmax, inputs scaled by s, relu, biases."""
        return cls(embed_dim=embed_dim, temperature=temperature, **changes)

    @classmethod
    def paper(cls, embed_dim: int, temperature: float = 1.0, **changes: Any) -> AdapterConfig:
        """The paper's arithmetic (Eq. 6): one head, row softmax, no input scale, no relu, no biases."""
        values: dict[str, Any] = {
            "num_heads": 1, "softmax": "row", "input_scale": "none", "mask_activation": "none", "bias": False,
        }  # fmt: skip
        return cls(embed_dim=embed_dim, temperature=temperature, **(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**dataclasses.asdict(self), "queries": list(self.queries)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """The inverse of to_dict. Raises ValueError naming an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"adapter configuration has unknown fields {', '.join(unknown)}")
        if isinstance(values.get("queries"), list):
            values = {**values, "queries": tuple(values["queries"])}
        return cls(**values)


@dataclass(frozen=True)
class TTTConfig:
    """One test-time episode (RAda, arXiv:2507.15480, Sec. 4.3): adapt to one image's views, predict, forget.

    Raises ValueError naming the field when a value is out of range.
    """

    steps: int = 3
    """Optimiser steps for each image (paper: 3)."""
    lr: float = 8e-4
    """Learning rate (paper: 8e-4)."""
    selection: float = 0.1
    """Share of the views kept: the int(selection * V) of lowest prediction entropy, at least one (paper: 0.1)."""
    loss: TTTLoss = "mean"
    """Mean of the kept views' entropies (Eq. 5), or "marginal": the entropy of their mean prediction (TPT)."""
    penalty: MaskPenalty = "l2"
    """Mask penalty (Eq. 7): l2, l1 or linf."""
    penalty_weight: float = 1.0
    """Weight of the mask penalty; the paper writes none in this setting, so 1."""
    optimizer: OptimizerName = "adamw"
    """adamw (paper), adam or sgd."""
    weight_decay: float = 0.01
    """Weight decay; torch's default for AdamW, which the paper does not change."""

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 0)
        check_positive("lr", self.lr)
        if not (isinstance(self.selection, int | float) and 0 < self.selection <= 1):
            raise UserError(f"selection must be above 0 and at most 1, got {self.selection!r}")
        check_choice("loss", self.loss, ("mean", "marginal"))
        check_choice("penalty", self.penalty, MASK_PENALTIES)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)
        check_choice("optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        check_positive("weight_decay", self.weight_decay, zero_ok=True)

    def num_selected(self, num_views: int) -> int:
        """How many of num_views views an episode keeps."""
        return max(1, int(self.selection * num_views))


@dataclass(frozen=True)
class ModelOptions:
    """The vision-language model."""

    model: str = "embedded"
    """An open_clip model's name, such as ViT-B-16-quickgelu, or "embedded", the small CLIP that is shipped."""
    pretrained: str | None = None
    """A hub tag such as openai, a local weights file, the folder of an fft, whose image encoder is taken, or "random"
    to try the machinery without weights."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    precision: Precision = "float32"
    """Arithmetic of the encoders; the adapter, its gradients and its optimiser stay in float32."""

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("float32", "bfloat16", "float16"))
        check_text("model", self.model)
        check_paths(self, "pretrained")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise UserError(f"device must be auto, cpu or cuda[:N], got {self.device!r}")


@dataclass(frozen=True)
class ClassOptions:
    """The classes and their text features."""

    classes: str | None = None
    """Class names: a text file (a name a line, or a table with a number or folder beside it) or JSON. Default: the
    folders' names; ImageNet's folders are recognised."""
    templates: str = "photo"
    """A template with {}, photo, simple (7), openai (80), a CoOp data set's name such as dtd, or a file."""
    text_features: str | None = None
    """Use these as T instead of encoding prompts: a features:FILE.npz with one row a class, classifier:RUN, the
    classifier that an fft in that folder has trained, or "class-means": the mean of each class's training features."""
    logit_scale: float | None = None
    """Multiplier s of the logits. Default: the model's; without a model, the array logit_scale of the feature files, or
    CLIP's 100."""

    def __post_init__(self) -> None:
        check_text("templates", self.templates)
        if "{" not in self.templates:
            check_paths(self, "templates")
        elif not self.templates.isascii() and self.templates.encode("utf-8", "replace").decode() != self.templates:
            raise UserError(f"templates must be text in UTF-8, got {self.templates!r}")
        check_paths(self, "classes", "text_features")
        if self.logit_scale is not None:
            check_positive("logit_scale", self.logit_scale)


@dataclass(frozen=True)
class AdapterOptions:
    """The rational adapter."""

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
    """Start from this adapter: our safetensors, a published checkpoint, or a run's folder. It decides all of the above,
    less --temperature and --num-heads of a published checkpoint, which does not hold them; an option that contradicts
    it is refused."""

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_choice("preset", self.preset, ("official", "paper"))
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        if self.num_heads is not None:
            check_whole("num_heads", self.num_heads, 1)
        if self.num_layers is not None:
            check_whole("num_layers", self.num_layers, 1, MOST_LAYERS)
        # What does not depend on the width is refused before a model is loaded.
        self.resolve(self.num_heads or 8)
        check_paths(self, "adapter")

    def _given(self) -> dict[str, Any]:
        """The fields of the configuration that were given, less the preset."""
        names = ("temperature", "num_heads", "queries", "num_layers", "mask_function")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}

    def resolve(self, embed_dim: int) -> AdapterConfig:
        """The full configuration at a model's width. Raises ValueError naming the field that does not fit."""
        make = AdapterConfig.paper if self.preset == "paper" else AdapterConfig.official
        return make(embed_dim, **self._given())

    def applied_to(self, config: AdapterConfig, *, stated: bool) -> AdapterConfig:
        """The configuration of the adapter's file, with the options that it leaves open.

        config: the file's; stated: whether the file says it all. Published ones hold no temperature and no number of
        heads, so config is then the published code's.

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
class RunOptions:
    """Where the results go and how the run behaves."""

    output: str = "results"
    """Folder for the results. A run that was cut off goes on where it stopped when started again with it."""
    seed: int = 0
    """Every random draw comes from (seed, image id), so order, workers and interruptions change nothing."""
    workers: int = 0
    """Processes that read images and make views; 0 does it in the main one."""
    limit: int | None = None
    """Take only this many images, spread over the classes."""
    overwrite: bool = False
    """Remove the results of another run that lie in the output folder."""
    allow_unreadable: int = 0
    """Exit with status 3 when more images than this could not be read; each is recorded either way."""
    json: bool = False
    """Print the summary as JSON on standard output instead of a table."""

    def __post_init__(self) -> None:
        check_paths(self, "output")
        check_whole("workers", self.workers, 0, MOST_WORKERS)
        check_whole("seed", self.seed, 0, MOST_SEED)
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        check_whole("allow_unreadable", self.allow_unreadable, 0)


@dataclass(frozen=True)
class TestTimeConfig:
    """Test-time training: adapt to each test image by itself, from its views alone (paper Sec. 4.3).

    For every image: encode the original and its random views once, keep the confident ones, take a few optimiser steps
    on a fresh copy of the adapter, predict the original, forget. Writes images.jsonl (a line an image, as it happens)
    and summary.json.

    Example: rada-fast ttt --data imagefolder:photos --model ViT-B-16-quickgelu --pretrained openai --output results/ttt
    """

    data: str
    """Images as KIND:PATH: imagefolder:DIR (a sub-folder a class), images:DIR (no labels; needs --classes), or
    features:FILE.npz (arrays features (N, V, D) or (N, D), and labels)."""
    views: int = 64
    """Views of an image, the original included (paper: 64)."""
    view_kind: ViewKind = "crop"
    """crop: random resized crops and flips, as for ImageNet's variants; augmix: also AugMix, for fine-grained sets."""
    episodes: int = 8
    """Images adapted at once; it changes speed and memory, never a result."""
    order_seed: int | None = None
    """Visit the images in a random order drawn from this seed; it changes no image's result."""
    run: RunOptions = RunOptions(output="results/ttt")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()
    episode: TTTConfig = TTTConfig()

    __test__ = False  # not a test case, whatever pytest makes of the name

    def __post_init__(self) -> None:
        check_paths(self, "data")
        check_whole("views", self.views, 1)
        check_whole("episodes", self.episodes, 1)
        if self.order_seed is not None:
            check_whole("order_seed", self.order_seed, 0, MOST_SEED)
        check_choice("view_kind", self.view_kind, ("crop", "augmix"))


@dataclass(frozen=True)
class EfficientConfig:
    """Efficient fine-tuning: train the adapter with frozen encoders; report base, new and their harmonic mean
    (paper Sec. 4.2).

    Writes epochs.jsonl (a line an epoch, as it happens), images.jsonl (a line a test image), adapter.safetensors and
    summary.json.

    Example: rada-fast eft --train imagefolder:train --test imagefolder:test --model ViT-B-16-quickgelu --pretrained
    openai --output results/eft
    """

    train: str
    """Training images as KIND:PATH: imagefolder:DIR, or features:FILE.npz."""
    test: str
    """Test images as KIND:PATH."""
    new_test: str | None = None
    """Test images of new classes, where they lie apart. Needs --protocol all."""
    protocol: Protocol = "base-to-new"
    """base-to-new: train on the first half of the classes, test on both halves; all: train and test on all classes."""
    shots: int | None = 16
    """Training images a class (paper: 16); None takes all."""
    epochs: int = 13
    """Passes over the training images (paper: 13)."""
    batch_size: int = 1
    """Images a step (paper: 1)."""
    lr: float = 9e-4
    """Learning rate (paper: 9e-4)."""
    optimizer: OptimizerName = "adamw"
    """adamw, adam or sgd (momentum 0.9), all three found in published configurations."""
    weight_decay: float = 5e-4
    """Weight decay (published configurations: 5e-4)."""
    schedule: Schedule = "cosine"
    """cosine with one warm-up epoch at 1e-5 (published configurations), or constant."""
    penalty: MaskPenalty = "l2"
    """Mask penalty: l2 (paper), l1, or linf (what the published code runs)."""
    penalty_weight: float = 1.5
    """Weight of the mask penalty (paper: 1.5)."""
    train_views: TrainViews = "center"
    """center: one fixed view, encoded once and cached; crop: a new random crop and flip each epoch (published)."""
    evaluate_every: int = 0
    """Also test after every so many epochs; 0 tests at the end only."""
    run: RunOptions = RunOptions(output="results/eft")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()

    def __post_init__(self) -> None:
        check_paths(self, "train", "test", "new_test")
        if self.shots is not None:
            check_whole("shots", self.shots, 1)
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 1)
        check_whole("evaluate_every", self.evaluate_every, 0)
        check_positive("lr", self.lr)
        check_positive("weight_decay", self.weight_decay, zero_ok=True)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)
        if self.new_test is not None and self.protocol != "all":
            raise UserError("new_test needs protocol 'all': with 'base-to-new' the new classes are test's second half")


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: a linear classifier, started from the text features, replaces the text encoder (Sec. 4.1).

    RAda trains the adapter and the classifier with frozen encoders; RAda-FT goes on from the adapter after a few of
    those epochs and trains everything, without the mask penalty. Writes epochs.jsonl, images.jsonl, the trained
    weights and summary.json.

    Example: rada-fast fft --train imagefolder:train --test imagefolder:val imagefolder:sketch --model
    ViT-B-16-quickgelu --pretrained openai --output results/fft
    """

    train: str
    """Training images as KIND:PATH. features:FILE.npz serves --stages rada only."""
    test: tuple[str, ...]
    """Test images, several KIND:PATH: the training domain's and shifted ones with the same classes."""
    stages: Stages = "both"
    """both, or rada: adapter and classifier only."""
    epochs: int = 10
    """Epochs of RAda (paper: 10)."""
    finetune_from: int = 5
    """RAda-FT starts from the weights after this many epochs of RAda (paper: 5)."""
    finetune_epochs: int = 5
    """Epochs of RAda-FT (paper: 5)."""
    batch_size: int = 512
    """Images a step (paper: 512)."""
    micro_batch: int | None = None
    """Split a step into parts of this many images to save memory; gradients are accumulated."""
    lr: float = 4e-3
    """Learning rate of RAda (paper: 4e-3)."""
    finetune_lr: float = 4e-6
    """Learning rate of RAda-FT (paper: 4e-6)."""
    weight_decay: float = 0.1
    """AdamW's weight decay (paper: 0.1)."""
    warmup_steps: int = 500
    """Linear warm-up, then cosine; at most a fifth of a stage's steps."""
    penalty: MaskPenalty = "l2"
    """Mask penalty, in RAda only."""
    penalty_weight: float = 1.0
    """Weight of the mask penalty (Eq. 14 writes none, so 1)."""
    train_views: TrainViews = "crop"
    """crop: random crops of 90 to 100 % of the picture, as open_clip trains; center: one fixed view."""
    run: RunOptions = RunOptions(output="results/fft")
    model: ModelOptions = ModelOptions()
    text: ClassOptions = ClassOptions()
    adapter: AdapterOptions = AdapterOptions()

    def __post_init__(self) -> None:
        if not self.test:
            raise UserError("test must name at least one source, got none")
        check_paths(self, "train", "test")
        for name in ("epochs", "finetune_epochs", "batch_size", "finetune_from"):
            check_whole(name, getattr(self, name), 1)
        if self.micro_batch is not None:
            check_whole("micro_batch", self.micro_batch, 1)
        check_whole("warmup_steps", self.warmup_steps, 0)
        if self.finetune_from > self.epochs:
            raise UserError(
                f"finetune_from must be at most epochs {self.epochs}, got {self.finetune_from}; unless given it is 5"
            )
        for name in ("lr", "finetune_lr"):
            check_positive(name, getattr(self, name))
        check_positive("weight_decay", self.weight_decay, zero_ok=True)
        check_positive("penalty_weight", self.penalty_weight, zero_ok=True)
