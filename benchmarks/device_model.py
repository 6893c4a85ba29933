"""Estimate how long every launch of a training step takes on an A100 or an H100, and how well it fills the device.

    python -m benchmarks.device_model
    python -m benchmarks.device_model --target 80 --sizes 1x50 6x200 --dtype float32 --json
    python -m benchmarks.device_model --compare measured.jsonl

No GPU is needed: the launches of the step are recorded, compiled for the device and read (launched_programs.py). The
table has for each launch its programs and warps, the blocks that a processor holds at once, how often the programs
fill all processors (waves), the share of the processors' time that is left idle, the steps that the longest program
takes one after the other, and three times in microseconds: the estimate, the one measured on an H100 where there is
one, and the floor, which the device's measured rates set for the same products and bytes. The last column is the share
of the estimate that the floor takes.

The estimate of a launch is the time to start one, plus the longest chain of programs that run one after the other in
the same place of a processor, plus the time that the processor with the most work is busy, plus what the last program
of a group does when the others have finished. A program takes a fixed time and a time for each of its steps, which is
shorter where loads run ahead of their use. It is never less than the floor. The constants were fitted to times measured
on an H100; those of the A100 are scaled from them by the ratios of the data sheets, so its times are no more than a
guess.

With --parts N, a further column has the estimate for N times as many programs: N programs share the steps of one, each
stores its sums in float32, and the last one to finish adds them up. No kernel does that; it shows what could be gained.

With --compare, the estimates are compared with measured times of launches with given tiles on the target, one JSON
object in a line: {"dtype": "bfloat16", "shape": [6, 200], "launch": "class_attention_forward", "tile": {"queries": 64,
...}, "us": 14.5}.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks import table
from benchmarks.launched_programs import STEPS, Numbers, Programs, programs_of
from benchmarks.simulate import parse_size
from rada_fast.bench.compiled import (
    TYPES,
    RecordedLaunch,
    compile_launch,
    compiled_code,
    resident_blocks,
    step_launches,
)
from rada_fast.bench.tuning import launches_with_tile
from rada_fast.config.method import AdapterConfig
from rada_fast.system.terminal import print_json

SIZES = ("1x50", "1x500", "6x200", "64x100")
MEASURED = Path(__file__).parent / "device" / "h100.json"
"""The sizes that device/bench_launches.py measured on an H100, and for each the microseconds of every launch."""


class Steps(NamedTuple):
    """Hold the microseconds of a program without its steps, of a step with loads ahead of their use, and of another
    step with loads. A step without loads takes no longer than its arithmetic."""

    program: float
    pipelined: float
    serial: float


@dataclass(frozen=True)
class Device:
    """Hold the constants of a device. Times are in microseconds, and rates are those of one processor in a microsecond.

    half, float32: the times of programs whose products are of 16-bit numbers, or that have none, and of float32 ones.
    load, atomic: the times of a load outside loops, and of an atomic operation.
    element: the time that a thread takes for an operation of arithmetic, when it runs by itself.
    peak: the most operations of products, by their name in launched_programs.COUNTS.
    tf32: the operations of TF32 products that the kernels reach: most of them cannot use the fastest instruction.
    memory_bytes: the bytes that the whole device moves to or from its memory in a microsecond.
    """

    name: str
    target: int
    processors: int
    launch: float
    half: Steps
    float32: Steps
    load: float
    atomic: float
    element: float
    peak: dict[str, float]
    tf32: float
    arithmetic: float
    loaded_bytes: float
    memory_bytes: float


H100 = Device(
    name="H100", target=90, processors=132,
    launch=1.63,
    half=Steps(0.75, 0.036, 0.214), float32=Steps(1.75, 0.146, 0.246),
    load=0.153, atomic=1.87, element=0.00057,
    peak={"half_operations": 792e6 / 132, "tf32_operations": 407e6 / 132, "float32_operations": 52e6 / 132},
    tf32=202e6 / 132,
    arithmetic=54e6 / 132, loaded_bytes=18.1e6 / 132, memory_bytes=3.0e6,
)  # fmt: skip


def _scaled_to_a100(device: Device) -> Device:
    """Return the constants of an A100-40GB, by the data sheets' ratios to an H100 SXM. Nothing of it was measured."""
    # The clocks are 1.41 GHz and 1.755 GHz. In a cycle, an A100's processor computes half as much without tensor cores,
    # and moves as many bytes.
    clock = 1.41 / 1.755
    processors = 108

    def slower(steps: Steps) -> Steps:
        return Steps(*(time / clock for time in steps))

    ratios = {"half_operations": 312 / 989, "tf32_operations": 156 / 494.5, "float32_operations": 19.5 / 66.9}
    each = device.processors / processors
    return Device(
        name="A100, scaled", target=80, processors=processors, launch=device.launch,
        half=slower(device.half), float32=slower(device.float32), load=device.load / clock,
        atomic=device.atomic / clock, element=device.element / clock,
        peak={name: rate * ratios[name] * each for name, rate in device.peak.items()},
        # The TF32 instruction of the kernels is the only one that an A100 has.
        tf32=min(device.tf32 * clock, device.peak["tf32_operations"] * ratios["tf32_operations"] * each),
        arithmetic=device.arithmetic * clock / 2, loaded_bytes=device.loaded_bytes * clock,
        memory_bytes=device.memory_bytes * 1555 / 3350,
    )  # fmt: skip


DEVICES = {90: H100, 80: _scaled_to_a100(H100)}


@dataclass(frozen=True)
class Estimate:
    """Hold what the model says of one launch.

    programs, warps: those of the launch, and the warps of a program. resident: the blocks that fit a processor at once.
    waves: how often the programs fill all processors. idle: the share of the processors' time without any program.
    steps: the most steps that a program takes. operations, bytes: those of all products, and the least bytes to move.
    us, floor_us: the estimated time, and the time that the device's rates set for the operations and the bytes.
    """

    launch: str
    programs: int
    warps: int
    resident: int
    waves: int
    idle: float
    steps: int
    operations: float
    bytes: int
    us: float
    floor_us: float


def least_bytes(launch: RecordedLaunch) -> int:
    """Return the bytes of all tensors of a launch: each is read or written at least once."""
    tensors = {value.data_ptr(): value.nbytes for value in launch.kwargs.values() if isinstance(value, Tensor)}
    return sum(tensors.values())


def arithmetic(counts: Mapping[str, Any]) -> Any:
    """Return the operations of arithmetic. An exponential takes the time of four others."""
    return counts["arithmetic"] + 4 * counts["exponentials"]


def steps_time(counts: Mapping[str, Any], warps: int, steps: Steps, device: Device) -> Any:
    """Return the microseconds that a program takes for its steps when nothing else runs; see Device."""
    times = counts["pipelined_steps"] * steps.pipelined + counts["serial_steps"] * steps.serial
    times = times + counts["loads"] * device.load + counts["atomics"] * device.atomic
    return times + arithmetic(counts) / (32 * warps) * device.element


def exact_products(programs: Programs) -> bool:
    """Return whether a launch has products of float32 numbers, for which its programs take longer.

    Launches without products take no longer than those of 16-bit ones: two of them, which are parts of other launches
    now, took 2 to 4 us on an H100 in either type.
    """
    return bool(programs.counts["tf32_operations"].any() or programs.counts["float32_operations"].any())


def work_times(programs: Programs, device: Device) -> Numbers:
    """Return the microseconds for which each program keeps its processor busy, with others or alone."""
    rates = {
        **device.peak,
        "tf32_operations": device.tf32,
        "loaded_bytes": device.loaded_bytes,
    }
    times = sum(programs.counts[name] / rate for name, rate in rates.items())
    return np.asarray(times + arithmetic(programs.counts) / device.arithmetic)


class Schedule(NamedTuple):
    """Hold the longest chain of programs and the most work of a processor, in microseconds, and the idle share."""

    chain: float
    work: float
    idle: float


def schedule(chains: Numbers, works: Numbers, resident: int, processors: int) -> Schedule:
    """Give every program to the place that is free first, as a GPU does, and return how long that takes."""
    free = [(0.0, block, processor) for block in range(resident) for processor in range(processors)]
    chain_of: dict[tuple[int, int], float] = {}
    work_of, end_of = np.zeros(processors), np.zeros(processors)
    for chain, work in zip(chains.tolist(), works.tolist(), strict=True):
        start, block, processor = heapq.heappop(free)
        place = (block, processor)
        chain_of[place] = chain_of.get(place, 0.0) + chain
        work_of[processor] += work
        end_of[processor] = max(end_of[processor], start + chain + work)
        heapq.heappush(free, (start + chain + work, block, processor))
    # Rounding may leave the mean above the largest number.
    idle = max(0.0, 1 - float(end_of.mean() / end_of.max()))
    return Schedule(max(chain_of.values()), float(work_of.max()), idle)


def in_parts(programs: Programs, parts: int) -> Programs:
    """Return the programs of a launch in which `parts` programs share the steps of one, and then add up their sums.

    What it takes to store the sums is left out.
    """
    if parts == 1:
        return programs
    counts = {}
    for name, count in programs.counts.items():
        share = {"loads": count, "atomics": count + 1}.get(name, count / parts)
        counts[name] = np.repeat(np.ceil(share) if name in STEPS else share, parts)
    # The last program waits for the sums of all parts, which it reads together.
    tail = programs.tail | {"loads": programs.tail["loads"] + 1}
    return Programs(counts, tail)


def estimate(launch: RecordedLaunch, device: Device, parts: int = 1) -> Estimate:
    """Return what the model says of a launch on a device, with every program in `parts` parts."""
    found = compile_launch(launch, device.target, "")
    programs = programs_of(launch, compiled_code(launch, device.target).asm["ttgir"])
    programs = in_parts(programs, parts)
    resident = resident_blocks(device.target, found.warps, found.registers, found.shared_bytes)
    steps = device.float32 if exact_products(programs) else device.half
    chains = steps.program + steps_time(programs.counts, found.warps, steps, device)
    works = work_times(programs, device)
    filled = schedule(chains, works, resident, device.processors)
    operations = {name: float(programs.counts[name].sum()) for name in device.peak}
    moved = least_bytes(launch)
    by_products = sum(count / device.peak[name] for name, count in operations.items()) / device.processors
    floor = max(device.launch, by_products, moved / device.memory_bytes)
    us = device.launch + filled.chain + filled.work + steps_time(programs.tail, found.warps, steps, device)
    return Estimate(
        launch=launch.kernel.__name__.removesuffix("_kernel"), programs=len(programs), warps=found.warps,
        resident=resident, waves=math.ceil(len(programs) / (resident * device.processors)), idle=filled.idle,
        steps=int(programs.steps.max()), operations=sum(operations.values()), bytes=moved,
        us=max(us, floor), floor_us=floor,
    )  # fmt: skip


def step_rows(batch: int, classes: int, dtype: str, device: Device, parts: int = 1) -> list[dict[str, Any]]:
    """Return a row for each launch of a step that computes every gradient but the features'."""
    adapter = AdapterConfig.official(512)
    launches = step_launches(adapter, batch, classes, TYPES[dtype], feature_gradients=False, target=device.target)
    measured = measured_us(batch, classes, dtype) if device is H100 else {}
    rows = []
    # The last launch belongs to a first step.
    for launch in launches[:-1]:
        found = estimate(launch, device)
        row = {"device": device.name, "batch": batch, "classes": classes, "dtype": dtype, **asdict(found)}
        row["measured_us"] = measured.get(found.launch)
        if parts > 1:
            row[f"in_{parts}_parts_us"] = estimate(launch, device, parts).us
        rows.append(row)
    return rows


def measured_us(batch: int, classes: int, dtype: str) -> dict[str, float]:
    """Return the times by launch that were measured on an H100 for a size; none for a size that was not."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    size = f"{batch}x{classes}"
    # The kernels made three TF32 products of a float32 product when these were measured, which a launch no longer does.
    if size not in found["sizes"] or dtype not in found["us"]:
        return {}
    at = found["sizes"].index(size)
    return {launch: times[at] for launch, times in found["us"][dtype].items()}


def comparison(lines: Sequence[str], device: Device) -> list[dict[str, Any]]:
    """Return measured launches, given as JSON lines, each with its estimate; those of other types are left out."""
    rows, config = [], AdapterConfig.official(512)
    for line in lines:
        row = json.loads(line)
        if row["us"] and row["dtype"] in TYPES:
            batch, classes = row["shape"]
            launches = launches_with_tile(
                config, batch, classes, TYPES[row["dtype"]], row["launch"], row["tile"], target=device.target
            )
            rows.append(row | {"estimate": sum(estimate(launch, device).us for launch in launches)})
    return rows


def error_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median and the worst factor between two times, each at least 1."""
    factors = [max(one / other, other / one) for one, other in pairs]
    return statistics.median(factors), max(factors)


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of one step: a line for each launch, and one for the sum."""
    times = [name for name in rows[0] if name.endswith("us")]
    counts = ("programs", "warps", "resident", "waves", "idle", "steps", "operations", "bytes")
    header = ["launch", *counts[:-2], "MFLOP", "MB", *(name.replace("_", " ") for name in times), "floor/us"]

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        shown = [table.number(row[key], digits) for key, digits in zip(counts, (0, 0, 0, 0, 2, 0, 0, 1), strict=True)]
        return [
            name,
            *shown,
            *(table.number(row[key], 1) for key in times),
            table.number(row["floor_us"] / row["us"], 2),
        ]

    total: dict[str, Any] = dict.fromkeys(counts)
    for name in times:
        known = [row[name] for row in rows if row[name] is not None]
        total[name] = sum(known) if len(known) == len(rows) else None
    millions = [row | {"operations": row["operations"] / 1e6, "bytes": row["bytes"] / 1e6} for row in rows]
    return table.aligned(header, [*(cells(row["launch"], row) for row in millions), cells("all of these", total)], [0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every size, or one JSON line for every launch. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", type=int, choices=sorted(DEVICES), default=90, help="80: A100, 90: H100 (default)")
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, default=[parse_size(size) for size in SIZES], metavar="BxK",
        help=f"images x classes; by default {' '.join(SIZES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="by default bfloat16")
    parser.add_argument("--parts", type=int, choices=[1, 2, 4, 8], default=1, help="also estimate programs in parts")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with the measured launches in a file")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each launch")
    options = parser.parse_args(arguments)
    device = DEVICES[options.target]
    if options.compare:
        compared = comparison(options.compare.read_text(encoding="utf-8").splitlines(), device)
        if options.json:
            for row in compared:
                print_json(row, indent=None)
        median, worst = error_of([(row["estimate"], row["us"]) for row in compared])
        found = (
            f"{len(compared)} launches: the estimate is off by a factor of {median:.2f} (median), at most {worst:.2f}"
        )
        print(found, file=sys.stderr if options.json else sys.stdout)
        return 0
    for episodes, batch, classes in options.sizes:
        if episodes > 1:
            parser.error("argument --sizes: must be BxK, as the model knows steps of one episode")
        rows = step_rows(batch, classes, options.dtype, device, options.parts)
        if options.json:
            for row in rows:
                print_json(row, indent=None)
        else:
            print(f"\n{device.name}, {batch} x {classes}, {options.dtype}")
            print("\n".join(lines_of(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
