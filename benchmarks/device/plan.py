"""The steps of a first contact, in their order: what all else needs comes first, and small comes before large."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("see", "build", "tests", "bench")
PYTEST = (
    "pytest", "-q", "-c", "benchmarks/device/pytest.ini", "--rootdir=.", "--confcutdir=.",
    "--continue-on-collection-errors", "-p", "benchmarks.device.each_test",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command, or the tests that pytest runs in as many processes as it takes.

    name: "stage.step".
    about: what it does, in one line.
    arguments: what follows ``python -m``.
    limit: the seconds that the whole step may take.
    test_limit: the seconds that one test may take.
    shown: for a command, a regular expression; its matches in the output are shown in the summary.
    """

    name: str
    about: str
    arguments: tuple[str, ...]
    limit: float
    test_limit: float = 120
    shown: str | None = None

    @property
    def stage(self) -> str:
        return self.name.partition(".")[0]

    @property
    def uses_pytest(self) -> bool:
        return self.arguments[0] == "pytest"


def checks(name: str, about: str, *arguments: str, limit: float = 240) -> Step:
    return Step(f"tests.{name}", about, (*PYTEST, "-m", "gpu", *arguments), limit)


def bench(name: str, about: str, file: str, chosen: str = "", providers: str = "") -> Step:
    options: tuple[str, ...] = ("--device", "cuda", "--figures", "{output}/figures.jsonl", "--benchmark-quiet")
    # A device's times hardly vary, and here its minutes count.
    options += ("--seconds", "0.5")
    options += (("-k", chosen) if chosen else ()) + (("--providers", providers) if providers else ())
    return Step(f"bench.{name}", about, (*PYTEST, f"benchmarks/{file}", *options), 300)


# The smallest problem, many classes, the size of test-time training, many of both, and a batch of training.
SHAPES = "official and (B1-K50- or B1-K500- or B6-K200- or B6-K1000- or B64-K100-)"
ADAPTER = "bench_rational_adapter.py"

PLAN = (
    Step("see.device", "the device, its limits, the compilers, the versions",
         ("benchmarks.device.facts", "{output}/facts.json"), 60, shown="^device: .*"),
    Step("see.doctor", "rada-fast doctor: backends and their self-test",
         ("rada_fast", "doctor", "--json"), 120, shown=r'"(triton|auto)": "(?!\d+\.\d+\.)[^"]*"'),
    Step("build.extension", "the C++ operators, and the CUDA ones for this device where nvcc is found",
         ("rada_fast", "build"), 300, shown=r"(?i)(no )?cuda kernels[^:\n]*(: [^/\n]*)?"),
    checks("launches", "every Triton launch by itself against the reference", "tests/kernels/test_launches.py"),
    checks("adapter", "the adapter, forward and backward, every option and type",
           "tests/kernels/test_rational_adapter.py"),
    checks("targets", "the adapter by the A100's code, beside the device's own", "tests/kernels/test_targets.py"),
    checks("cuda_ops", "the CUDA C++ operators", "tests/cuda", "tests/extension/test_cuda_toolkit.py"),
    checks("episodes", "whole episodes of test-time training", "tests/engine"),
    checks("graphs", "operators and steps captured in CUDA graphs", "tests/kernels", "tests/cuda", "-k", "graph"),
    checks("context", "many episodes at once, torch.compile, autocast, strided inputs", "tests/kernels"),
    bench("floor", "the device's product rates, its bandwidth, the cost of a launch", "device/bench_floor.py"),
    bench("launches", "each kernel of a step, and the step in a graph", "device/bench_launches.py"),
    bench("adapter", "a training step of the adapter", ADAPTER, f"{SHAPES} and step", "literal,reference,triton"),
    bench("episodes", "episodes of test-time training", "bench_episodes.py"),
    checks("others", "all tests that no other step has: plain PyTorch in float64, the loops", "tests", limit=300),
    bench("compile", "torch.compile of the reference beside the kernels", ADAPTER, f"{SHAPES} and step",
          "reference,compile,triton"),
    bench("ops", "losses, selection, optimiser, views", "",
          "prediction_losses or view_selection or episodic_optimizer or views"),
    bench("forward", "the adapter's forward pass alone", ADAPTER, f"{SHAPES} and forward", "literal,reference,triton"),
)  # fmt: skip


def chosen(names: list[str]) -> list[Step]:
    """The steps with these names or of stages with these names, in the plan's order.

    Raises ValueError naming a stage or step that does not exist.
    """
    for name in names:
        if name not in (*STAGES, *(step.name for step in PLAN)):
            raise ValueError(f"no stage or step {name!r}; there are {', '.join((*STAGES, *(s.name for s in PLAN)))}")
    return [step for step in PLAN if not names or step.name in names or step.stage in names]
