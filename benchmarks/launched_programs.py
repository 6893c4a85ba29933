"""What every program of a Triton launch does, read from the compiled code without executing it.

A launch has from a few to thousands of programs. They share one code, in which a program's number chooses what it
computes and how many steps it takes. So the code's whole numbers are computed here for all programs at once, and a loop
of n steps counts n times what one step does. Tensors are not computed. The result says for every program how many
steps, products, bytes and other operations it has.

The code is that of Triton's GPU stage ("ttgir"), the last one with loops and tensors. So the counts include what the
compiler has decided: which loads run ahead of their use, and of how many TF32 products a float32 product consists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rada_fast.bench.compiled import RecordedLaunch

Numbers = NDArray[Any]

STEPS = ("pipelined_steps", "serial_steps", "register_steps")
"""The steps of loops whose loads run ahead of their use, of loops that wait for their loads, and of loops that load no
tensor."""
COUNTS = (
    *STEPS,
    "half_operations",  # operations of 16-bit products on tensor cores
    "tf32_operations",  # operations of TF32 products on tensor cores
    "float32_operations",  # operations of products without tensor cores
    "loaded_bytes",
    "arithmetic",  # elements that arithmetic with float numbers computes
    "exponentials",  # elements of exponentials, logarithms, roots and quotients
    "loads",  # loads of tensors outside loops
    "atomics",
)
"""What is counted for each program."""

_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
_OPERATION = re.compile(r'^(?:(%[\w.$-]+)(?::\d+)? = )?"?(\w+\.[\w.]+)"?(.*)$')
_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
_TENSOR = re.compile(
    r"(?:tensor|memdesc)<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)>?(?:, (?:#ttg\.dot_op<\{opIdx = (\d), parent = )?(#\w+))?"
)
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia_mma|blocked)<\{(.*)\}>")
_LISTS = re.compile(r"(\w+) = \[([\d, ]+)\]")
_LOOP = re.compile(r"(%[\w.$-]+) = (\S+) to (\S+) step (\S+)")
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i64": 8, "bf16": 2, "f16": 2, "f64": 8}
_SPECIAL = ("exp2", "log2", "exp", "log", "sqrt", "divf")


def _divided(a: Numbers, b: Numbers) -> Numbers:
    """Return a / b rounded towards zero, and 0 for b = 0."""
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)))


def _remainder(a: Numbers, b: Numbers) -> Numbers:
    return np.asarray(a - _divided(a, b) * b)


_COMPARISONS: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal, "ult": np.less, "ule": np.less_equal, "ugt": np.greater, "uge": np.greater_equal,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "divsi": _divided, "divui": _divided,
    "remsi": _remainder, "remui": _remainder, "minsi": np.minimum, "maxsi": np.maximum, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor,
}  # fmt: skip


@dataclass
class Programs:
    """Hold what the programs of a launch do.

    counts: for each name in COUNTS a number for each program, in the order of the launch.
    tail: the counts of what only the last program of a group does, when all others of the group have finished.
    """

    counts: dict[str, Numbers]
    tail: dict[str, float]

    def __len__(self) -> int:
        return len(self.counts["loads"])

    @property
    def steps(self) -> Numbers:
        """The steps that each program takes one after the other."""
        return np.asarray(sum(self.counts[name] for name in STEPS))


def programs_of(launch: RecordedLaunch, code: str) -> Programs:
    """Return what the programs of a launch do. code: the text of Triton's GPU stage for this launch."""
    lines = code.splitlines()
    module, _ = _parse(_LOCATION.sub("", line).strip() for line in lines if not line.startswith("#"))
    function = module.operations[0].regions[0].operations[0]
    reader = _Reader(launch, _layouts(lines))
    reader.run(function.regions[0], reader.every_program, in_loop=False)
    return Programs(reader.counts, reader.tail)


@dataclass
class _Operation:
    """Hold a line of the code, and the regions that it opens."""

    text: str
    regions: list[_Region]


@dataclass
class _Region:
    operations: list[_Operation] = field(default_factory=list)


def _parse(lines: Iterator[str]) -> tuple[_Region, bool]:
    """Return the operations up to the end of a region, and whether another region of the same operation follows."""
    region = _Region()
    for line in lines:
        if line.startswith("}"):
            return region, line.endswith("{")
        regions: list[_Region] = []
        follows = line.endswith("{")
        while follows:
            inner, follows = _parse(lines)
            regions.append(inner)
        if line:
            region.operations.append(_Operation(line, regions))
    return region, False


class _Layout(NamedTuple):
    """Hold how a tensor lies in the registers of a block: the elements that all warps cover at once, and the warps."""

    covered: list[int]
    warps: list[int]


def _layouts(lines: Sequence[str]) -> dict[str, _Layout]:
    """Return the layouts that the first lines of the code define, by name."""
    layouts = {}
    for found in filter(None, map(_LAYOUT.match, lines)):
        name, text = found.groups()
        lists = {key: [int(number) for number in numbers.split(",")] for key, numbers in _LISTS.findall(text)}
        warps = lists["warpsPerCTA"]
        if "instrShape" in lists:
            of_a_warp = lists["instrShape"]
        else:
            of_a_warp = [
                size * threads for size, threads in zip(lists["sizePerThread"], lists["threadsPerWarp"], strict=True)
            ]
        layouts[name] = _Layout([size * count for size, count in zip(of_a_warp, warps, strict=False)], warps)
    return layouts


class _Tensor(NamedTuple):
    """Hold the number of elements of a tensor, its last extent, the type of its elements, and the copies of each
    element in the registers of a block: where a tensor is too small for all warps, several compute the same."""

    elements: int
    last: int
    kind: str
    copies: float


class _Reader:
    """Goes through the code once, and computes whole numbers for all programs of a launch.

    A number that depends on a float, on a pointer, on what memory holds or on the step of a loop is unknown, None.
    """

    def __init__(self, launch: RecordedLaunch, layouts: dict[str, _Layout]) -> None:
        self.layouts = layouts
        x, y, z = launch.grid
        program = np.arange(x * y * z)
        self.places = {"x": program % x, "y": program // x % y, "z": program // (x * y)}
        self.extents = {"x": x, "y": y, "z": z}
        self.every_program = np.ones(len(program))
        self.counts: dict[str, Numbers] = {name: np.zeros(len(program)) for name in COUNTS}
        self.tail = dict.fromkeys(COUNTS, 0.0)
        self.values: dict[str, Numbers | None] = {
            f"%{name}": np.asarray(value) if isinstance(value, int) else None for name, value in launch.kwargs.items()
        }

    def add(self, name: str, weight: Numbers | float, amount: float = 1) -> None:
        """Add to a count. weight: how often each program does it; a single number stands for the tail."""
        if isinstance(weight, np.ndarray):
            self.counts[name] += weight * amount
        else:
            self.tail[name] += weight * amount

    def tensors(self, text: str) -> list[_Tensor]:
        """Return the tensors whose types stand in an operation."""
        return [self.tensor(*found) for found in _TENSOR.findall(text)]

    def tensor(self, shape: str, kind: str, operand: str, layout: str) -> _Tensor:
        extents = [int(extent) for extent in shape.split("x") if extent]
        copies, found = 1.0, self.layouts.get(layout)
        if found and operand:
            # Warps that lie side by side have the same rows of the left operand, and others the same columns.
            copies = found.warps[1 - int(operand)]
        elif found:
            copies = math.prod(
                max(1, covered / extent) for covered, extent in zip(found.covered, extents, strict=False)
            )
        return _Tensor(math.prod(extents), extents[-1], kind, copies)

    def operands(self, text: str) -> list[Numbers | None]:
        """Return the values named in an operation, before its types."""
        return [self.values.get(name) for name in _NAME.findall(text.split(" : ")[0])]

    def run(self, region: _Region, weight: Numbers | float, *, in_loop: bool) -> list[Numbers | None]:
        """Count a region that each program executes `weight` times. Returns the numbers that it yields."""
        labels: dict[str, Numbers | float] = {}
        for operation in region.operations:
            if operation.text.startswith("^"):
                weight = labels.get(re.split(r"[:(]", operation.text)[0], weight)
                continue
            found = _OPERATION.match(operation.text)
            if found is None:
                continue
            result, name, rest = found.groups()
            if name == "scf.yield":
                return self.operands(rest)
            if name == "scf.for":
                self.count_loop(rest, operation.regions[0], weight)
            elif name == "scf.if":
                self.count_branches(result, rest, operation.regions, weight, in_loop=in_loop)
            elif name.startswith("cf."):
                self.branch(name, rest, weight, labels)
            else:
                self.values[result] = None if _TENSOR.search(rest) else self.number(name, rest)
                self.count(name, rest, weight, in_loop=in_loop)
        return []

    def branch(self, name: str, rest: str, weight: Numbers | float, labels: dict[str, Numbers | float]) -> None:
        """Note which programs go on at which label."""
        targets = re.findall(r"\^bb\d+", rest)
        shares: list[Any] = [1.0]
        if name == "cf.cond_br":
            condition = self.operands(rest)[0]
            # Where the model does not know the condition, half of the programs are taken to go either way.
            taken = 0.5 if condition is None else condition.astype(bool)
            shares = [taken, 1 - taken]
        for target, share in zip(targets, shares, strict=True):
            labels[target] = labels.get(target, 0.0) + weight * share

    def count_loop(self, rest: str, body: _Region, weight: Numbers | float) -> None:
        found = _LOOP.search(rest)
        assert found is not None, rest
        index, *bounds = found.groups()
        first, end, step = map(self.values.get, bounds)
        changing = re.findall(r"(%[\w.$-]+) = ", rest.partition("iter_args")[2])
        self.values |= dict.fromkeys((index, *changing))
        steps: Any = 1.0
        if first is not None and end is not None and step is not None:
            steps = np.maximum(0, _divided(end - first + step - 1, step))
        weight = weight * (steps if isinstance(weight, np.ndarray) else float(np.max(steps)))
        texts = [operation.text.partition(" = ")[2] for operation in body.operations]
        loads = any(text.startswith("tt.load") and _TENSOR.search(text) for text in texts)
        ahead = any(text.startswith("ttg.async_wait") for text in texts)
        self.add(STEPS[0] if ahead else STEPS[1] if loads else STEPS[2], weight)
        self.run(body, weight, in_loop=True)

    def count_branches(
        self, result: str | None, rest: str, regions: list[_Region], weight: Numbers | float, *, in_loop: bool
    ) -> None:
        condition = self.operands(rest)[0]
        if condition is None:
            # Outside loops, only the last program of a group gets here. What some steps of a loop do beside the others
            # counts nothing.
            self.run(regions[0], 0.0 if in_loop else 1.0, in_loop=in_loop)
            return
        taken = condition.astype(bool)
        shares = (taken, 1 - taken)
        yielded = [
            self.run(region, weight * share, in_loop=in_loop) for region, share in zip(regions, shares, strict=False)
        ]
        if result is None:
            return
        for at, (one, other) in enumerate(zip(*yielded, strict=True)):
            chosen = None if one is None or other is None else np.where(taken, one, other)
            self.values[f"{result}#{at}"] = self.values[result] = chosen

    def count(self, name: str, rest: str, weight: Numbers | float, *, in_loop: bool) -> None:
        """Count an atomic operation, or an operation on tensors."""
        tensors = self.tensors(rest)
        if name.startswith("tt.atomic"):
            self.add("atomics", weight)
        if not tensors:
            return
        first, result = tensors[0], tensors[-1]
        size = _BYTES.get(first.kind, 4)
        if name in ("tt.dot", "ttng.warp_group_dot"):
            on_tensor_cores = name != "tt.dot" or size == 2 or "inputPrecision = tf32" in rest
            key = "half_operations" if size == 2 else "tf32_operations" if on_tensor_cores else "float32_operations"
            # The last extent of the left operand is the length of the sums.
            self.add(key, weight, 2.0 * result.elements * result.copies * first.last)
        elif name in ("tt.load", "ttg.async_copy_global_to_local"):
            self.add("loaded_bytes", weight, first.elements * size)
            if name == "tt.load" and not in_loop:
                self.add("loads", weight)
        elif name == "tt.reduce":
            self.add("arithmetic", weight, first.elements * first.copies)
        elif name.startswith(("arith.", "math.")) and name != "arith.constant":
            if name.partition(".")[2] in _SPECIAL:
                self.add("exponentials", weight, result.elements * result.copies)
            elif result.kind in ("f32", "bf16", "f16"):
                self.add("arithmetic", weight, result.elements * result.copies)

    def number(self, name: str, rest: str) -> Numbers | None:
        """Return the result of an operation on single numbers."""
        if name == "tt.get_program_id":
            return self.places[rest.split()[0]]
        if name == "tt.get_num_programs":
            return np.asarray(self.extents[rest.split()[0]])
        if name == "arith.constant":
            text = rest.split(" : ")[0].strip()
            text = {"true": "1", "false": "0"}.get(text, text)
            return np.asarray(int(text)) if re.fullmatch(r"-?\d+", text) else None
        operands = [operand for operand in self.operands(rest) if operand is not None]
        if not operands or len(operands) < len(self.operands(rest)):
            return None
        operation = name.partition(".")[2]
        if operation in ("extsi", "extui", "trunci", "index_cast"):
            return operands[0]
        if operation == "cmpi":
            return np.asarray(_COMPARISONS[rest.split()[0].rstrip(",")](*operands)).astype(int)
        if operation == "select":
            return np.where(operands[0].astype(bool), operands[1], operands[2])
        return _ARITHMETIC[operation](*operands) if operation in _ARITHMETIC else None
