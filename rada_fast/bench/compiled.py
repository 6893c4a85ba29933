"""Compile the GPU kernels for any target on any machine, and report registers, spills, shared memory and occupancy."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.table import Table
from torch import Tensor

from rada_fast.config.method import AdapterConfig
from rada_fast.config.tools import KernelsOptions
from rada_fast.extension import cuda_toolkit, libraries
from rada_fast.kernels._shared_memory import BLOCK_KIB, Target, assumed_target
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter, use_backend
from rada_fast.system.terminal import PlainConsole, print_json

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64"
}  # fmt: skip
_REGISTERS = 65536
"""The registers of a multiprocessor of every target."""


class Multiprocessor(NamedTuple):
    """Hold what a multiprocessor has for its blocks: shared memory in KiB, warps, and the number of blocks."""

    shared_kib: int
    warps: int
    blocks: int


_MULTIPROCESSORS = {
    80: Multiprocessor(164, 64, 32),
    86: Multiprocessor(100, 48, 16),
    89: Multiprocessor(100, 48, 24),
    90: Multiprocessor(228, 64, 32),
    100: Multiprocessor(228, 64, 32),
    120: Multiprocessor(100, 48, 24),
}
_TENSOR = re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """Hold the resources of one kernel on one target.

    spills: the bytes that a thread spills, stored plus loaded; shared_limit: the bytes of shared memory that a block
    may have; occupancy: the share of a multiprocessor's warps that fit.
    """

    kernel: str
    target: str
    case: str
    warps: int
    registers: int
    spills: int
    shared_bytes: int
    shared_limit: int
    occupancy: float
    tensor_instructions: int

    def fault(self) -> str | None:
        """Return what is wrong with the kernel, None for one that fits the target and does not spill."""
        name = f"{self.target} {self.kernel} ({self.case})"
        if self.shared_bytes > self.shared_limit:
            return f"{name} needs {self.shared_bytes} bytes of shared memory, and a block has {self.shared_limit}"
        return f"{name} spills {self.spills} bytes" if self.spills else None


class RecordedLaunch(NamedTuple):
    """Hold a kernel launch that was not executed: the kernel, its arguments by position and by name, and its grid."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: tuple[int, int, int]


@contextmanager
def recorded() -> Iterator[list[RecordedLaunch]]:
    """Open a block in which kernel launches are appended to the returned list and not executed."""
    launches: list[RecordedLaunch] = []
    jit = triton.runtime.jit.JITFunction

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        x, y, z, *_ = (*grid, 1, 1)
        launches.append(RecordedLaunch(self, args, kwargs, (x, y, z)))

    original = jit.run
    jit.run = record
    try:
        yield launches
    finally:
        jit.run = original


def step_launches(
    config: AdapterConfig,
    batch: int,
    classes: int,
    dtype: torch.dtype,
    *,
    features: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    feature_gradients: bool = True,
    target: int = 80,
) -> list[RecordedLaunch]:
    """Return the launches of one forward and one backward pass with every gradient, and the first step's own launch.

    features, weights: the types in which they lie in memory; where one is not dtype, autocast computes in dtype.
    feature_gradients: whether the features' gradients are among the backward pass's.
    target: the compute capability that the tiles have to fit.
    """
    features, weights = features or dtype, weights or dtype
    parameters = {
        key: value.detach().to(weights).requires_grad_() for key, value in RationalAdapter(config).named_parameters()
    }
    image, text = (
        torch.zeros(rows, config.embed_dim, dtype=features, requires_grad=feature_gradients)
        for rows in (batch, classes)
    )
    autocast = torch.autocast("cpu", dtype, enabled=(features, weights) != (dtype, dtype))
    with assumed_target(Target.of_capability(target)), recorded() as launches, use_backend("triton"), autocast:
        output = rational_adapter(image, text, 100.0, parameters, config, penalty="l2")
        assert output.penalty is not None
        (output.logits.sum() + output.penalty).backward()
        every_gradient = len(launches)
        output = rational_adapter(image.detach(), text.detach(), 100.0, parameters, config, output_is_zero=True)
        output.logits.sum().backward()
    return [*launches[:every_gradient], launches[-1]]


class Specialization(NamedTuple):
    """Say for which arguments Triton compiles a kernel: their types by name, constants and alignments by position."""

    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    alignments: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


def _specialization(launch: RecordedLaunch) -> Specialization:
    """Return the specialization that Triton's launcher would choose for the arguments of a launch."""
    kernel, args, kwargs, _grid = launch
    names = [parameter.name for parameter in kernel.params]
    bound = dict(zip(names, args, strict=False)) | {key: value for key, value in kwargs.items() if key in names}
    options = {key: value for key, value in kwargs.items() if key not in names}
    found = Specialization({}, {}, {}, options)
    for position, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        aligned, specializes = False, not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specializes):
            found.signature[parameter.name] = "constexpr"
            found.constants[(position,)] = value
        elif isinstance(value, Tensor):
            found.signature[parameter.name], aligned = _POINTERS[value.dtype], True
        elif isinstance(value, int):
            found.signature[parameter.name], aligned = "i32", specializes and value % 16 == 0
        else:
            found.signature[parameter.name] = "fp32"
        if aligned:
            found.alignments[(position,)] = [["tt.divisibility", 16]]
    return found


def compiled_code(launch: RecordedLaunch, target: int) -> Any:
    """Return what Triton compiles for a launch: an object with the code at every stage, and its metadata."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = _specialization(launch)
    source = ASTSource(fn=launch.kernel, signature=found.signature, constexprs=found.constants, attrs=found.alignments)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=found.options)


def compile_launch(launch: RecordedLaunch, target: int, case: str) -> Compiled:
    """Compile the kernel of a launch, and read its use of resources from the output of ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas

    binary = compiled_code(launch, target)
    ptx, warps, shared = binary.asm["ptx"], binary.metadata.num_warps, binary.metadata.shared
    target_line = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
    assert target_line
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        arch, cubin = target_line[1].split(",")[0], str(path.with_suffix(".cubin"))
        # Triton had one assembler for all devices up to version 3.5.
        assembler = get_ptxas(target) if inspect.signature(get_ptxas).parameters else get_ptxas()
        command = [assembler.path, "-v", f"-arch={arch}", str(path), "-o", cubin]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", report)[-1])
    spills = sum(int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill", report))
    return Compiled(
        launch.kernel.__name__, f"sm_{target}", case, warps, registers, spills, shared, 1024 * BLOCK_KIB[target],
        _occupancy(target, warps, registers, shared), len(_TENSOR.findall(ptx)),
    )  # fmt: skip


def resident_blocks(target: int, warps: int, registers: int, shared: int) -> int:
    """Return how many blocks of a kernel fit a multiprocessor at once."""
    multiprocessor = _MULTIPROCESSORS[target]
    return min(
        multiprocessor.blocks,
        multiprocessor.warps // warps,
        _REGISTERS // ((registers + 7) // 8 * 8 * 32 * warps),
        multiprocessor.shared_kib * 1024 // (shared + 1024),
    )


def _occupancy(target: int, warps: int, registers: int, shared: int) -> float:
    return resident_blocks(target, warps, registers, shared) * warps / _MULTIPROCESSORS[target].warps


def compile_cuda(target: int) -> list[Compiled] | str:
    """Compile every kernel of csrc/cuda for one target; return the reason where this installation cannot do that.

    Shared memory, and with it occupancy, counts only what the compiler knows; a launch may ask for more.
    """
    toolkit, folder = cuda_toolkit.find_toolkit(), libraries.source_dir()
    if isinstance(toolkit, str) or folder is None:
        return toolkit if isinstance(toolkit, str) else "this installation has no C++ sources"
    rows = []
    for source in sorted((folder / "cuda").glob("*.cu")):
        for found in cuda_toolkit.kernel_resources(toolkit, source, target):
            warps = -(-found.threads // 32)
            occupancy = _occupancy(target, warps, found.registers, found.shared)
            row = Compiled(
                found.kernel, f"sm_{target}", source.name, warps, found.registers, found.spills, found.shared,
                1024 * BLOCK_KIB[target], occupancy, found.tensor_instructions,
            )  # fmt: skip
            rows.append(row)
    return rows


def run_kernels(config: KernelsOptions) -> int:
    """Print the report, or measure tiles. Returns 0 where every kernel fits its target and none spills, 1 otherwise."""
    adapter = (
        AdapterConfig.paper(config.embed_dim) if config.preset == "paper" else AdapterConfig.official(config.embed_dim)
    )
    if config.tune:
        from rada_fast.bench.tuning import run_tuning

        return run_tuning(config, adapter, TYPES[config.dtype])
    case = f"{config.preset} D {config.embed_dim}, B {config.batch}, K {config.classes}, {config.dtype}"
    cases = {case: TYPES[config.dtype]}
    if config.dtype != "float32":
        cases[f"{case} under autocast"] = torch.float32
    tables: dict[str, list[Compiled]] = {}
    console = PlainConsole()
    # A narrower table would cut off every number.
    console.width = max(console.width, 130)
    for name, stored in cases.items():
        tables[name] = []
        for target in config.targets:
            launches = step_launches(
                adapter, config.batch, config.classes, TYPES[config.dtype], features=stored, weights=stored,
                target=target,
            )  # fmt: skip
            for launch in launches:
                if not config.json:
                    PlainConsole(stderr=True).print(f"sm_{target} {launch.kernel.__name__}", style="dim")
                tables[name].append(compile_launch(launch, target, name))
    cuda_rows = []
    for target in config.targets:
        compiled = compile_cuda(target)
        if isinstance(compiled, str):
            PlainConsole(stderr=True).print(f"no table of the CUDA C++ kernels: {compiled}")
            break
        cuda_rows += compiled
    if cuda_rows:
        tables["CUDA C++"] = cuda_rows
    rows = [row for shown in tables.values() for row in shown]
    if config.json:
        for row in rows:
            print_json(asdict(row), indent=None)
    for title, shown in {} if config.json else tables.items():
        table = Table(title=title)
        for name in (
            "target",
            "kernel",
            "warps",
            "registers",
            "spilled B",
            "shared B",
            "of B",
            "occupancy",
            "tensor instr.",
        ):
            table.add_column(
                name, justify="left" if name in ("target", "kernel") else "right", no_wrap=name == "kernel"
            )
        for row in shown:
            table.add_row(
                row.target, row.kernel, str(row.warps), str(row.registers), str(row.spills), str(row.shared_bytes),
                str(row.shared_limit), f"{row.occupancy:.2f}", str(row.tensor_instructions),
            )  # fmt: skip
        console.print(table)
    faults = [fault for row in rows if (fault := row.fault())]
    for fault in faults:
        PlainConsole(stderr=True).print(fault)
    return 1 if faults else 0
