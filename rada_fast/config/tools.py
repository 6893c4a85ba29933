"""Define the frozen configurations of the commands demo, report, doctor, kernels and build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rada_fast.config.checks import MAX_SEED, check_choices, check_integer, check_paths, check_positive
from rada_fast.errors import UserError

MAX_DEMO_IMAGES = 100_000
"""The demo's test-time training takes no more pictures than these, which are half a gigabyte and hours of work."""
DrawnShift = Literal["blur", "noise", "contrast", "hue", "occlusion", "sketch", "mixed"]
"""The kinds of shift of the drawn world, as `embedded` names them, and "mixed" for all of them in turn."""
MAX_ROWS = 2**20
"""The kernels are compiled for no more images or classes than these."""


@dataclass(frozen=True)
class DemoOptions:
    """Show the method on the small CLIP that is shipped and its drawn images: zero-shot prediction, test-time training
    and a short EFT, in about a minute on two cores.

    Writes the drawn images, each run's results, report.json and demo.png into the output folder. Started there again
    with other options, it replaces the earlier results that they concern.
    """

    output: str = "results/demo"
    """Folder for everything the demo writes."""
    images: int = 1000
    """Shifted test images for test-time training, spread over the classes."""
    eft_shift: DrawnShift = "sketch"
    """The kind of images that EFT trains on and is tested on. A data set to fine-tune on is mostly of one kind; mixed
    takes all of them in turn, as the images of test-time training do."""
    epochs: int = 8
    """Epochs of the short EFT."""
    seed: int = 0
    """Seed of the drawn images, the views and the training."""

    def __post_init__(self) -> None:
        check_paths(self, "output")
        check_integer("images", self.images, 1, MAX_DEMO_IMAGES)
        check_choices(self)
        check_integer("epochs", self.epochs, 1)
        # The drawn worlds take three seeds each.
        check_integer("seed", self.seed, 0, MAX_SEED // 3 - 1)


@dataclass(frozen=True)
class ReportOptions:
    """Make tables of finished runs: for each set of images, for base and new classes, and for each class.

    Runs that differ in their seed alone are repetitions: their mean, their spread and an interval are reported. Every
    table is written as JSON, CSV and Markdown.

    Example: rada-fast report results/eft-seed1 results/eft-seed2 results/eft-seed3 --output results/report
    """

    WITHOUT_FLAG: ClassVar[str] = "runs"

    runs: tuple[str, ...] = ()
    """Folders of runs of ttt, eft, fft or eval, or folders that contain such folders. --runs itself can be left out."""
    compare: tuple[str, ...] = ()
    """Compare these two runs image by image, by McNemar's test."""
    output: str = "results/report"
    """Folder for the tables."""
    json: bool = False
    """Print the tables as JSON on standard output."""

    def __post_init__(self) -> None:
        check_paths(self, "runs", "compare", "output")
        if len(self.compare) not in (0, 2):
            raise UserError(f"compare must name two runs, got {len(self.compare)}")


@dataclass(frozen=True)
class StatusOptions:
    """Say how runs stand: their processes, what is done and left, the rate and the time left, the accuracy so far,
    epochs and loss, unreadable images, the size on disk, the last warnings, and the command that goes on.

    It only reads, so it may be called while runs go on. The exit status is 2 if a folder is not that of a run.

    Example: rada-fast status results/ttt results/eft --follow
    """

    WITHOUT_FLAG: ClassVar[str] = "folders"

    folders: tuple[str, ...] = ()
    """Folders of runs of any command, or folders that contain such folders. --folders itself can be left out."""
    follow: bool = False
    """Look again every second until no run goes on any more; where the output is no terminal, print a line a minute."""
    json: bool = False
    """Print JSON: a list with an object for each run, with --follow one such list in every line."""

    def __post_init__(self) -> None:
        check_paths(self, "folders")
        if not self.folders:
            raise UserError("folders must name one or more folders of runs, as in rada-fast status results/ttt")


@dataclass(frozen=True)
class DoctorOptions:
    """Report what is installed, which backends are usable and why others are not, and run a small numeric self-test.

    With --data, check data instead: folders, numbers of images and classes, names, splits and unreadable files, and say
    how to mend what is wrong. The exit status is 1 where something is.

    Example: rada-fast doctor --data coop:data/dtd imagenet-a:data
    """

    data: tuple[str, ...] = ()
    """Data to check, one or more KIND:PATH. Every part is checked unless one is named, as in coop:data/dtd@val."""
    all_files: bool = False
    """Decode every picture of the data. Default: 200 pictures of each part, spread over the classes."""
    json: bool = False
    """Print JSON, for an issue report."""

    def __post_init__(self) -> None:
        check_paths(self, "data")


@dataclass(frozen=True)
class KernelsOptions:
    """Report what the GPU kernels compile to: the Triton kernels of one training step, and the CUDA C++ kernels where
    nvcc is found.

    The command needs no device and takes about two minutes. Its exit status is 1 where a kernel spills registers, or
    needs more shared memory than a block has on the target.
    """

    preset: Literal["official", "paper"] = "official"
    """The adapter: official has 8 heads of width D/8 and the matrix softmax, paper one head and the row softmax."""
    embed_dim: int = 512
    """Width D of the embeddings."""
    batch: int = 6
    """Number B of images."""
    classes: int = 1000
    """Number K of classes."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the features and the parameters, and of the products under autocast, where both are in float32."""
    targets: tuple[Literal[80, 86, 89, 90, 100, 120], ...] = (80, 86, 89, 90, 100, 120)
    """Compute capabilities: 80 is A100, 86 RTX 30 and A10, 89 RTX 40 and L4, 90 H100, 100 B200, 120 RTX 50."""
    tune: bool = False
    """Instead, measure up to ten tiles of each launch on this machine's GPU, and use the fastest in later calls."""
    json: bool = False
    """Print one JSON line for each kernel and target."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_integer("batch", self.batch, 1, MAX_ROWS)
        check_integer("classes", self.classes, 1, MAX_ROWS)
        check_integer("embed_dim", self.embed_dim, 1, 2**16)
        if self.preset == "official" and self.embed_dim % 8:
            raise UserError(f"embed_dim must be a multiple of 8 with preset 'official', got {self.embed_dim}")
        if not self.targets:
            raise UserError("targets must name at least one compute capability, got none")
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"targets must not repeat a compute capability, got {self.targets}")


@dataclass(frozen=True)
class BuildOptions:
    """Compile the C++ extension once for the installed PyTorch, with ninja and this machine's C++ compiler.

    No other command compiles C++: without the extension the package runs on plain PyTorch.
    """

    jobs: int | None = None
    """Compilers to run at once. Default: as many as processors and free memory allow."""
    timeout: float = 600.0
    """Seconds to wait for another build of the same extension."""
    force: bool = False
    """Compile everything again."""

    def __post_init__(self) -> None:
        if self.jobs is not None:
            check_integer("jobs", self.jobs, 1, 2**16)
        check_positive("timeout", self.timeout)
