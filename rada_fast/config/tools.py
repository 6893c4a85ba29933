"""Frozen configurations of the commands around the loops: demo, doctor, kernels and build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rada_fast.config.checks import MOST_SEED, check_paths, check_positive, check_whole
from rada_fast.errors import UserError

MOST_DEMO_IMAGES = 100_000
"""The most pictures of the demo's test-time training: half a gigabyte on the disk, and hours."""
MOST_ROWS = 2**20
"""The most images or classes that the kernels are compiled for."""


@dataclass(frozen=True)
class DemoOptions:
    """The method on the embedded default: zero-shot, test-time training and a short EFT on the shipped small CLIP and
    its drawn world, in about two minutes on two cores.

    Writes the drawn images, each run's results, report.json and demo.png into the output folder.
    """

    output: str = "results/demo"
    """Folder for everything the demo writes."""
    images: int = 240
    """Shifted test images for test-time training, spread over the classes."""
    epochs: int = 8
    """Epochs of the short EFT."""
    seed: int = 0
    """Seed of the drawn images, the views and the training."""

    def __post_init__(self) -> None:
        check_paths(self, "output")
        check_whole("images", self.images, 1, MOST_DEMO_IMAGES)
        check_whole("epochs", self.epochs, 1)
        # The drawn worlds take three seeds each.
        check_whole("seed", self.seed, 0, MOST_SEED // 3 - 1)


@dataclass(frozen=True)
class DoctorOptions:
    """What is installed, which backends are usable and why not, and a small numeric self-test."""

    json: bool = False
    """Print JSON, for an issue report."""


@dataclass(frozen=True)
class KernelsOptions:
    """What the GPU kernels compile to: Triton's of one training step, and the CUDA C++ ones where nvcc is found.

    Needs no device; takes about a minute.

    The exit status is 1 where a kernel spills registers.
    """

    preset: Literal["official", "paper"] = "official"
    """The adapter: heads of D/8 and the matrix softmax, or one wide head and the row softmax."""
    embed_dim: int = 512
    """D."""
    batch: int = 6
    """B, images."""
    classes: int = 1000
    """K."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of features and parameters."""
    targets: tuple[Literal[80, 90, 100], ...] = (80, 90, 100)
    """Compute capabilities: 80 is A100, 90 H100, 100 B200."""
    tune: bool = False
    """Measure up to ten tiles of each launch on this machine's GPU instead, and keep the fastest for later calls."""
    json: bool = False
    """Print one JSON line for each kernel and target."""

    def __post_init__(self) -> None:
        check_whole("batch", self.batch, 1, MOST_ROWS)
        check_whole("classes", self.classes, 1, MOST_ROWS)
        check_whole("embed_dim", self.embed_dim, 1, 2**16)
        if self.preset == "official" and self.embed_dim % 8:
            raise UserError(f"embed_dim must be a multiple of 8 with preset 'official', got {self.embed_dim}")
        if not self.targets:
            raise UserError("targets must name at least one compute capability, got none")
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"targets must not repeat a compute capability, got {self.targets}")


@dataclass(frozen=True)
class BuildOptions:
    """Compile the C++ extension once for this PyTorch, with ninja and the C++ compiler that is here.

    Nothing else ever compiles: without it the package runs on plain PyTorch.
    """

    jobs: int | None = None
    """Compilers at once. Default: as many as processors and free memory allow."""
    timeout: float = 600.0
    """Seconds to wait for another build of the same thing."""
    force: bool = False
    """Compile everything again."""

    def __post_init__(self) -> None:
        if self.jobs is not None:
            check_whole("jobs", self.jobs, 1, 2**16)
        check_positive("timeout", self.timeout)
