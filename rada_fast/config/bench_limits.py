"""Define the options of `bench roofline` and `bench scaling`: what limits the operators, and how their cost grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rada_fast.config.checks import MAX_LAYERS, bytes_of, check_choices, check_integer, check_positive
from rada_fast.config.measuring import GRID, MAX_SIZE, MeasuringOptions, check_sizes, check_width
from rada_fast.config.options import ModelOptions, Precision
from rada_fast.errors import UserError

RooflineOperator = Literal[
    "adapter", "episodes", "selection", "losses", "optimizer", "views", "encoder-attention", "small-transformer"
]  # fmt: skip
"""What `bench roofline` measures; see bench/roofline.py."""
ROOFLINE_OPERATORS: tuple[RooflineOperator, ...] = get_args(RooflineOperator)
ScalingAxis = Literal["classes", "batch", "episodes"]
"""The numbers that grow in `bench scaling`."""
ScalingProvider = Literal["rada_fast", "reference", "literal"]
ScalingPass = Literal["forward", "step", "episode"]
PREDICTION_CLASSES = (200, 1000)
"""The numbers K of classes at which the operators over predictions are measured."""


@dataclass(frozen=True)
class BenchRooflineOptions:
    """Compare every operator of this package with the least time that this machine's measured limits allow: the rate of
    matrix products in the type and with the threads in use, and the bandwidth of memory and caches.

    For each operator and size the table has its operations, the bytes that it must read and write, operations for each
    byte, the floor, the best time, and the floor's share of it. With --output there is also a roofline chart. An
    interrupted run goes on with the same command.

    Example: rada-fast bench roofline --output results/roofline
    """

    only: tuple[RooflineOperator, ...] = ()
    """Measure only these operators. Default: all."""
    batch: tuple[int, ...] = ()
    """Numbers B of images for the adapter. Default, with --classes: the sizes of `bench adapter`."""
    classes: tuple[int, ...] = ()
    """Numbers K of classes. Default for the operators over predictions: 200 and 1000."""
    episodes: tuple[int, ...] = (1, 8)
    """Numbers E of episodes for the operators that serve several at once."""
    views: int = 64
    """Views V of a picture."""
    image_size: int = 224
    """Side of a view in pixels."""
    embed_dim: int = 512
    """Width D of the features."""
    precision: tuple[Precision, ...] = ("float32", "bfloat16")
    """Types of the features and of the parameters."""
    backend: Literal["compiled", "reference"] = "compiled"
    """compiled: the C++ operators on a CPU, Triton and CUDA kernels on a GPU; reference: plain PyTorch."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    measuring: MeasuringOptions = MeasuringOptions(seconds=2.0)

    def __post_init__(self) -> None:
        check_choices(self)
        ModelOptions(device=self.device)
        for name in ("batch", "classes"):
            if getattr(self, name):
                check_sizes(name, getattr(self, name))
        if self.batch and not self.classes:
            raise UserError("batch must come with classes, got none")
        check_sizes("episodes", self.episodes)
        if not self.precision:
            raise UserError("precision must name at least one type, got none")
        check_integer("views", self.views, 1, MAX_SIZE)
        check_integer("image_size", self.image_size, 16, 2**14)
        check_width(self.embed_dim)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the pairs (B, K) at which the adapter is measured."""
        return tuple((batch, classes) for batch in self.batch for classes in self.classes) or GRID


@dataclass(frozen=True)
class BenchScalingOptions:
    """Measure how time and memory of the adapter and of test-time training grow with the numbers K of classes, B of
    images and E of episodes, and fit exponents. With --output there is also a picture with a panel for each.

    A size that would take more memory or time than is allowed, as the smaller ones tell, is left out, and the output
    says so. All sizes take about a quarter of an hour on two cores. An interrupted run goes on with the same command.

    Example: rada-fast bench scaling --classes 50 200 1000 5000 --output results/scaling
    """

    classes: tuple[int, ...] = (50, 100, 200, 500, 1000, 2000, 5000, 10000, 21843)
    """Numbers K of classes, with one image; ImageNet-21k has 21843."""
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers B of images."""
    episodes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers E of pictures that are adapted to together."""
    common_classes: int = 200
    """Number K of classes while B or E grows."""
    axes: tuple[ScalingAxis, ...] = ("classes", "batch", "episodes")
    """Which numbers grow."""
    passes: tuple[ScalingPass, ...] = ("forward", "step", "episode")
    """forward: the adapter's logits; step: forward and backward with the mask penalty; episode: test-time training of a
    picture, from the features of its views to its prediction."""
    providers: tuple[ScalingProvider, ...] = ("rada_fast", "reference", "literal")
    """rada_fast: the compiled operator or the GPU's kernels; reference: plain PyTorch; literal: as published, which
    has no episode of its own."""
    views: int = 64
    """Views V of a picture in test-time training."""
    steps: int = 3
    """Steps of test-time training."""
    preset: Literal["official", "paper"] = "official"
    """The published code's arithmetic, or the paper's."""
    embed_dim: int = 512
    """Width D of the features."""
    precision: Precision = "float32"
    """Type of the features and of the parameters."""
    memory: str | None = None
    """The most memory that a call may take, such as 8GiB. Default: three quarters of what is available."""
    longest: float = 300.0
    """The most seconds that a call may take."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    measuring: MeasuringOptions = MeasuringOptions(seconds=1.0)

    def __post_init__(self) -> None:
        check_choices(self)
        ModelOptions(device=self.device)
        for name in ("classes", "batch", "episodes"):
            check_sizes(name, getattr(self, name))
        for name in ("axes", "passes", "providers"):
            if not getattr(self, name):
                raise UserError(f"{name} must name at least one, got none")
        for name in ("common_classes", "views"):
            check_integer(name, getattr(self, name), 1, MAX_SIZE)
        check_integer("steps", self.steps, 1, MAX_LAYERS)
        check_positive("longest", self.longest)
        if self.memory is not None:
            bytes_of("memory", self.memory)
        check_width(self.embed_dim)
