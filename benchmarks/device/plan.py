"""What is run on a device, in this order: what everything else stands on first, and small before large."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("see", "build", "tests", "bench")
PYTEST = (
    "pytest", "-q", "-c", "benchmarks/device/pytest.ini", "--rootdir=.", "--continue-on-collection-errors",
    "-p", "benchmarks.device.each_test",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One process, or for pytest as many as it takes.

    name: "stage.step"; arguments: after ``python -m``; about: a line for the table of the plan.
    limit: seconds for the whole step; quiet: seconds that one test may take.
    shows: of a command, the expression whose matches in its output are said in the table.
    """

    name: str
    about: str
    arguments: tuple[str, ...]
    limit: float
    quiet: float = 120
    shows: str | None = None

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
    options += (("-k", chosen) if chosen else ()) + (("--providers", providers) if providers else ())
    return Step(f"bench.{name}", about, (*PYTEST, f"benchmarks/{file}", *options), 300)


# The smallest problem, many classes, test-time training's, both many, a batch of training.
SHAPES = "official and (B1-K50- or B1-K500- or B6-K200- or B6-K1000- or B64-K100-)"
ADAPTER = "bench_rational_adapter.py"

PLAN = (
    Step("see.device", "the device, its limits, compilers, versions",
         ("benchmarks.device.facts", "{output}/facts.json"), 60, shows="^device: .*"),
    Step("see.doctor", "rada-fast doctor: backends and their self-test",
         ("rada_fast", "doctor", "--json"), 120, shows=r'"(triton|auto)": "(?!\d+\.\d+\.)[^"]*"'),
    Step("build.extension", "C++ operators, and CUDA's for this device where nvcc is",
         ("rada_fast", "build"), 300, shows=r"(?i)(no )?cuda kernels[^:\n]*(: [^/\n]*)?"),
    checks("launches", "every Triton launch by itself against the reference", "tests/kernels/test_launches.py"),
    checks("adapter", "the adapter, forward and backward, every option and type",
           "tests/kernels/test_rational_adapter.py"),
    checks("cuda_ops", "CUDA C++ operators", "tests/cuda", "tests/extension/test_cuda_toolkit.py"),
    checks("episodes", "whole episodes of test-time training", "tests/engine/test_episodes.py"),
    checks("graphs", "captured in CUDA graphs", "tests/kernels", "tests/cuda", "-k", "graph"),
    checks("context", "episodes at once, compiled, under autocast, strided", "tests/kernels"),
    bench("floor", "the device's product rates, bandwidth, launch cost", "device/bench_floor.py"),
    bench("adapter", "the adapter, a training step", ADAPTER, f"{SHAPES} and step", "literal,reference,triton"),
    bench("episodes", "episodes of test-time training", "bench_episodes.py"),
    checks("others", "plain PyTorch in float64, the shipped loops, all that no step above has", "tests", limit=300),
    bench("compile", "torch.compile of the reference beside the kernels", ADAPTER, f"{SHAPES} and step",
          "reference,compile,triton"),
    bench("ops", "losses, selection, optimiser, views", "",
          "prediction_losses or view_selection or episodic_optimizer or views"),
    bench("forward", "the adapter, forward alone", ADAPTER, f"{SHAPES} and forward", "literal,reference,triton"),
)  # fmt: skip


def chosen(names: list[str]) -> list[Step]:
    """The steps of stages or of single steps, in the plan's order. Raises ValueError naming what there is not."""
    for name in names:
        if name not in (*STAGES, *(step.name for step in PLAN)):
            raise ValueError(f"no stage or step {name!r}; there are {', '.join((*STAGES, *(s.name for s in PLAN)))}")
    return [step for step in PLAN if not names or step.name in names or step.stage in names]
