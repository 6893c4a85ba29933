"""Define the options of the command `bench`: one configuration for each thing that it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rada_fast.config.bench_limits import BenchRooflineOptions, BenchScalingOptions
from rada_fast.config.checks import (
    MAX_LAYERS,
    MAX_WORKERS,
    bytes_of,
    check_choices,
    check_integer,
    check_paths,
)
from rada_fast.config.commands import Stages, ViewKind
from rada_fast.config.measuring import GRID, MAX_SIZE, MeasuringOptions, check_sizes, check_width
from rada_fast.config.options import ModelOptions, Precision, RunOptions
from rada_fast.errors import UserError

AdapterBackend = Literal["literal", "reference", "compile", "cpu", "cpu-float32", "triton"]
AdapterPass = Literal["forward", "step"]
RivalName = Literal[
    "rada_fast", "zero-shot", "encode-fast", "encode", "rada-literal", "rada-careful", "tpt", "maple", "zero", "mta",
    "vte",
]  # fmt: skip
"""What `bench rivals` compares; see bench/rivals.py."""
RIVALS: tuple[RivalName, ...] = get_args(RivalName)
Table5Name = Literal["maple", "tpt", "rada-literal", "rada_fast"]
TABLE5_METHODS: tuple[Table5Name, ...] = get_args(Table5Name)
"""The methods of `bench table5`, in the order of its tables."""


@dataclass(frozen=True)
class BenchTTTOptions:
    """Measure test-time training from image files to predictions, and each of its stages alone: reading and views,
    encoding, adaptation.

    The overhead ratio is the time end to end over the time to encode the same views alone, in one interleaved run. The
    text features are random rows of unit length, because the number of the classes decides the cost, and not their
    names.

    Example: rada-fast bench ttt --model ViT-B-16-quickgelu --pretrained random --classes 200 1000 --pictures 2
    """

    data: str | None = None
    """Pictures as KIND:PATH: imagefolder:DIR or images:DIR. Default: drawn pictures as JPEG files."""
    pictures: int = 8
    """Pictures from disk to predictions in one call."""
    classes: tuple[int, ...] = (200,)
    """Numbers K of classes; each makes a setting of its own."""
    views: int = 64
    """Views V of a picture, the original included (paper: 64)."""
    view_kind: ViewKind = "crop"
    """crop: random resized crops and flips; augmix: also AugMix."""
    steps: int = 3
    """Optimiser steps for each picture (paper: 3)."""
    workers: int = RunOptions.workers
    """Threads that decode pictures and cut views, ahead of the one that encodes and adapts; 0 reads nothing ahead."""
    memory: str | None = None
    """About how much memory the pipeline may take, such as 2GiB, which picks the number of pictures adapted together.
    Default: what groups of a useful size need."""
    baseline: bool = False
    """Also time the same in plain PyTorch: Pillow's views, open_clip's module and the published arithmetic."""
    measuring: MeasuringOptions = MeasuringOptions()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_sizes("classes", self.classes)
        check_integer("pictures", self.pictures, 1, MAX_SIZE)
        check_integer("views", self.views, 1, MAX_SIZE)
        check_integer("steps", self.steps, 0, MAX_LAYERS)
        check_integer("workers", self.workers, 0, MAX_WORKERS)
        if self.memory is not None:
            bytes_of("memory", self.memory)


@dataclass(frozen=True)
class BenchEFTOptions:
    """Measure the training steps of efficient fine-tuning: on one repeated batch of pictures with the encoder in each
    step, as published figures are counted, and on cached features.

    The published figure is training iterations per second over 1000 iterations on one batch; --iterations 1000 makes
    exactly these. The overhead ratio is the time of such an iteration over the time to encode its batch alone.

    Example: rada-fast bench eft --model ViT-B-16-quickgelu --pretrained random --classes 50 100 500
    """

    classes: tuple[int, ...] = (50, 100, 500)
    """Numbers K of classes; each makes a setting of its own."""
    batch: tuple[int, ...] = (1,)
    """Pictures B of a step (paper: 1); each number makes settings of its own."""
    iterations: int | None = None
    """Calls in a row of each stage in a round. Default: as many as take a tenth of a second."""
    embed_dim: int | None = None
    """Measure cached features of this width only, without any encoder."""
    measuring: MeasuringOptions = MeasuringOptions()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_sizes("classes", self.classes)
        check_sizes("batch", self.batch)
        check_width(self.embed_dim)
        if self.iterations is not None:
            check_integer("iterations", self.iterations, 1, 10**6)


@dataclass(frozen=True)
class BenchFFTOptions:
    """Measure the training steps of full fine-tuning: of the adapter and the classifier on features, and of these with
    the image encoder.

    Example: rada-fast bench fft --embed-dim 512 --classes 1000 --batch 8 512
    """

    classes: tuple[int, ...] = (100,)
    """Numbers K of classes; each makes a setting of its own."""
    batch: tuple[int, ...] = (8, 64)
    """Pictures B of a step (paper: 512); each number makes settings of its own."""
    stages: Stages = "both"
    """both, or first: adapter and classifier only."""
    embed_dim: int | None = None
    """Measure features of this width only, without any encoder."""
    memory: str | None = None
    """About how much memory a step may take, such as 2GiB, as in the option of the command `fft`."""
    measuring: MeasuringOptions = MeasuringOptions()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        if self.memory is not None:
            bytes_of("memory", self.memory)
        check_sizes("classes", self.classes)
        check_sizes("batch", self.batch)
        check_width(self.embed_dim)


@dataclass(frozen=True)
class BenchEncoderOptions:
    """Measure the image encoder, beside open_clip's own module in plain PyTorch.

    Example: rada-fast bench encoder --model ViT-B-16-quickgelu --pretrained random --batch 1 64
    """

    batch: tuple[int, ...] = (64,)
    """Views of one call; each number makes a setting of its own."""
    measuring: MeasuringOptions = MeasuringOptions()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_sizes("batch", self.batch)


@dataclass(frozen=True)
class BenchViewsOptions:
    """Measure reading a picture and making its views, in one process: decoding, drawing the boxes, cutting.

    Example: rada-fast bench views --data imagefolder:photos --views 64 --image-size 224
    """

    data: str | None = None
    """Pictures as KIND:PATH: imagefolder:DIR or images:DIR. Default: drawn pictures as JPEG files."""
    pictures: int = 8
    """Pictures of one call."""
    views: tuple[int, ...] = (64,)
    """Views V of a picture, the original included (paper: 64); each number makes settings of its own."""
    view_kind: tuple[ViewKind, ...] = ("crop", "augmix")
    """crop: random resized crops and flips; augmix: also AugMix."""
    image_size: int = 224
    """Side of a view in pixels."""
    measuring: MeasuringOptions = MeasuringOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data")
        check_sizes("views", self.views)
        check_integer("pictures", self.pictures, 1, MAX_SIZE)
        check_integer("image_size", self.image_size, 1, 2**14)


@dataclass(frozen=True)
class BenchAdapterOptions:
    """Measure the adapter by itself, forward and in a training step, beside the published arithmetic.

    Without --batch and --classes, the sizes are those of the developers' benchmark: 1 x 50, 1 x 500, 6 x 200, 6 x 1000,
    64 x 100 and 32 x 1000.

    Example: rada-fast bench adapter --batch 6 --classes 200 1000 --backend literal reference cpu
    """

    batch: tuple[int, ...] = ()
    """Numbers B of images."""
    classes: tuple[int, ...] = ()
    """Numbers K of classes; every B is measured with every K."""
    backend: tuple[AdapterBackend, ...] = ()
    """What computes it; compile is torch.compile of the reference, and cpu-float32 is the backend cpu in float32 where
    the precision is another. Default: all that are usable here but compile, which compiles for half a minute before
    each size and pass."""
    passes: tuple[AdapterPass, ...] = ("forward", "step")
    """forward: the logits; step: forward and backward with the mask penalty."""
    preset: Literal["official", "paper"] = "official"
    """The published code's arithmetic, or the paper's."""
    embed_dim: int = 512
    """Width D of the features."""
    precision: Precision = "float32"
    """Type of the features and of the parameters."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    measuring: MeasuringOptions = MeasuringOptions(seconds=5.0)

    def __post_init__(self) -> None:
        check_choices(self)
        ModelOptions(device=self.device)
        for name in ("batch", "classes"):
            if getattr(self, name):
                check_sizes(name, getattr(self, name))
        if bool(self.batch) != bool(self.classes):
            raise UserError("batch and classes must be given together, or both left out")
        check_width(self.embed_dim)
        if self.preset == "official" and self.embed_dim % 8:
            raise UserError(f"embed_dim must be a multiple of 8 with preset 'official', got {self.embed_dim}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the pairs (B, K) to measure."""
        return tuple((batch, classes) for batch in self.batch for classes in self.classes) or GRID


@dataclass(frozen=True)
class BenchRivalsOptions:
    """Compare test-time adaptation by this package with other methods, on the same views of the same pictures: speed,
    memory, operations, and accuracy before and after.

    The other methods are RAda as published and as a careful user writes it, TPT, MaPLe, ZERO, MTA and VTE, all with
    open_clip's module in plain PyTorch. What is timed begins with the views in memory. Without --data, the pictures are
    the shifted domain of the embedded world; for another model they are drawn, and their accuracy means nothing.

    Example: rada-fast bench rivals --pictures 200
    """

    data: str | None = None
    """Pictures with labels as KIND:PATH, as for ttt. Default: drawn pictures."""
    pictures: int = 200
    """Pictures to predict, spread over the classes."""
    together: int = 8
    """Pictures in memory at once. Each method predicts all of them in turn before the next method does."""
    only: tuple[RivalName, ...] = ()
    """Measure only these. Default: all."""
    views: int = 64
    """Views V of a picture, the original included (papers: 64)."""
    view_kind: ViewKind = "crop"
    """crop: random resized crops and flips; augmix: also AugMix."""
    steps: int = 3
    """Optimiser steps of RAda for each picture (paper: 3). TPT and MaPLe take one, as published."""
    classes: str | None = None
    """File with the names of the classes, as --classes of ttt. Default: the data's own."""
    numbered_classes: int = 200
    """Number K of classes where no data are given and the model is not the embedded one."""
    templates: tuple[str, ...] = ("photo",)
    """Prompt of a class, as --templates of ttt, but a single one, from which TPT and MaPLe start."""
    ensemble: tuple[str, ...] = ()
    """Prompts of VTE, as --templates of ttt. Default: CLIP's 80; for the embedded model eight in its own words."""
    seed: int = 0
    """Seed of the pictures, of their views and of everything that starts at random."""
    output: str | None = None
    """Also write the figures into this folder, as JSON lines."""
    json: bool = False
    """Print one JSON line for each method instead of a table."""
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        check_paths(self, "data", "classes", "output")
        for name in ("pictures", "together", "views", "numbered_classes"):
            check_integer(name, getattr(self, name), 1, MAX_SIZE)
        check_integer("steps", self.steps, 0, MAX_LAYERS)
        check_integer("seed", self.seed, 0, 2**31 - 1)


@dataclass(frozen=True)
class BenchTable5Options:
    """Remake the paper's Table 5 on this machine: frames per second, memory and GFLOPs of MaPLe, TPT, RAda as published
    and this package, in efficient fine-tuning and in test-time training, beside the paper's rows of an A100.

    Each row says what its frames and its GFLOPs count, and so does each of the paper's rows, as far as its figures
    tell. The peak of memory of each method is that of a process of its own.

    Example: rada-fast bench table5 --model ViT-B-16-quickgelu --pretrained random --output results/table5
    """

    eft_classes: int = 50
    """Number K of classes in efficient fine-tuning. 50 fits the paper's GFLOPs."""
    ttt_classes: int = 200
    """Number K of classes in test-time training. 200 fits the paper's GFLOPs."""
    views: int = 64
    """Views V of a picture in test-time training, the original included (paper: 64)."""
    steps: int = 3
    """Optimiser steps of RAda for each picture (paper: 3)."""
    only: tuple[Table5Name, ...] = ()
    """Measure only these methods. Default: all."""
    settings: tuple[Literal["eft", "ttt"], ...] = ("eft", "ttt")
    """eft, ttt or both."""
    measuring: MeasuringOptions = MeasuringOptions()
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("eft_classes", "ttt_classes", "views"):
            check_integer(name, getattr(self, name), 1, MAX_SIZE)
        check_integer("steps", self.steps, 0, MAX_LAYERS)
        if not self.settings:
            raise UserError("settings must name eft, ttt or both, got none")


BenchOptions = (
    BenchTTTOptions
    | BenchEFTOptions
    | BenchFFTOptions
    | BenchEncoderOptions
    | BenchViewsOptions
    | BenchAdapterOptions
    | BenchRooflineOptions
    | BenchScalingOptions
    | BenchRivalsOptions
    | BenchTable5Options
)
PARTS: dict[str, type[BenchOptions]] = {
    "ttt": BenchTTTOptions,
    "eft": BenchEFTOptions,
    "fft": BenchFFTOptions,
    "encoder": BenchEncoderOptions,
    "views": BenchViewsOptions,
    "adapter": BenchAdapterOptions,
    "roofline": BenchRooflineOptions,
    "scaling": BenchScalingOptions,
    "rivals": BenchRivalsOptions,
    "table5": BenchTable5Options,
}
"""What `rada-fast bench` measures, and the options of each."""
