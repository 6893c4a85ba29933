"""A tool for developers: whether the memory of test-time training stays flat while pictures stream through it.

    python -m benchmarks.streaming_memory --log memory.jsonl
    python -m benchmarks.streaming_memory --seconds 600 --every 10 --threads 2

It writes the shipped model's pictures to files and lets ``TestTimePredictor`` stream them again and again, each time
under other names and so with other views. Once a minute it writes down how much memory of the process is resident, how
many bytes of it malloc has given out, and how many objects Python has. At the end it prints a table and says of each
figure whether it stays flat, which means that it grows by less than a stated tolerance.

Resident memory alone cannot tell whether anything of a picture is kept. The heap takes pages in steps, such as the
3 MiB of the views of one picture, whenever freed blocks do not fit the next ones, and it keeps them. That happens
seldom, and more seldom the longer the process runs, so a straight line says little about it. The bytes that are given
out and the objects show what is kept, because whatever is kept of each picture adds to them with each picture.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import table
from rada_fast import TestTimePredictor
from rada_fast.embedded import world
from rada_fast.system.memory import keep_freed_memory

PICTURES_PER_CLASS = 2
WARM_UP = 0.1
"""This share of the figures, the first ones, is left out: caches fill up, and the heap finds its size."""
MOST_RISE = 0.01
"""Resident memory may rise by this share of itself after the warm-up: by some of the heap's steps."""
MOST_AUTOCORRELATION = 0.95


class Sample(NamedTuple):
    """Hold what was measured at one time.

    seconds: the time since the start.
    processor_seconds: the time for which the process has computed, which is less where it was stopped.
    pictures: how many pictures have been predicted.
    resident_mib: the memory of the process that is resident.
    allocated_bytes: the bytes that malloc has given out, or None where the C library does not tell. Small blocks that a
        thread has freed and keeps for itself count as well; these are at most 230 KiB for a thread.
    python_blocks: the blocks of memory that Python's objects take.
    """

    seconds: float
    processor_seconds: float
    pictures: int
    resident_mib: float
    allocated_bytes: int | None
    python_blocks: int


class Measure(NamedTuple):
    """Say which figures are not to grow with the pictures.

    name: what is measured.
    unit: the unit of its growth.
    value: the figure of a sample.
    tolerance: the growth that still counts as flat.
    """

    name: str
    unit: str
    value: Callable[[Sample], float | None]
    tolerance: float


MEASURES = (
    # malloc gives out no fewer than 24 bytes, so this is less than anything that could be kept of each picture.
    Measure("memory in use", "bytes a picture", lambda s: s.allocated_bytes, 16.0),
    # An object of Python takes a block or more.
    Measure("objects of Python", "blocks a picture", lambda s: s.python_blocks, 0.5),
)


class Trend(NamedTuple):
    """Hold the slope of a straight line, and its standard error."""

    slope: float
    error: float

    @property
    def most(self) -> float:
        """The slope and twice its error, above which the true slope hardly lies."""
        return self.slope + 2 * self.error


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class _MallocInfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def allocated_bytes() -> int | None:
    """Return how many bytes malloc has given out to all threads, or None where the C library does not tell."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def after_warm_up(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Leave out the first samples. Raises ValueError if fewer than four are left."""
    kept = samples[math.ceil(WARM_UP * len(samples)) :]
    if len(kept) < 4:
        raise ValueError(f"samples must be at least 5, got {len(samples)}")
    return kept


def resident_rise(samples: Sequence[Sample]) -> float:
    """Return by which share of itself the resident memory has risen at the most since the end of the warm-up."""
    resident = [sample.resident_mib for sample in after_warm_up(samples)]
    return max(resident) / resident[0] - 1


def trend_of(samples: Sequence[Sample], measure: Measure) -> Trend | None:
    """Fit a straight line over the pictures to the samples after the warm-up. Returns None if there is nothing to fit.

    Memory grows in steps, so that neighbouring samples deviate from the line together. Its error is therefore computed
    as that of fewer samples, by the correlation between neighbours.
    """
    kept = after_warm_up(samples)
    values = [value for sample in kept if (value := measure.value(sample)) is not None]
    if len(values) < len(kept):
        return None
    across = torch.tensor([sample.pictures for sample in kept], dtype=torch.float64)
    memory = torch.tensor(values, dtype=torch.float64)
    across, memory = across - across.mean(), memory - memory.mean()
    spread = float((across**2).sum())
    if spread == 0:
        return None
    slope = float((across * memory).sum()) / spread
    residuals = memory - slope * across
    squares = float((residuals**2).sum())
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / squares if squares > 0 else 0.0
    correlation = min(max(correlation, 0.0), MOST_AUTOCORRELATION)
    fewer = (1 + correlation) / (1 - correlation)
    return Trend(slope, math.sqrt(fewer * squares / (len(kept) - 2) / spread))


def is_flat(measure: Measure, trend: Trend) -> bool:
    """Return whether a figure grows by less than its tolerance, with twice the standard error added."""
    return trend.most < measure.tolerance


def sentence(measure: Measure, trend: Trend) -> str:
    verdict = "flat" if is_flat(measure, trend) else "NOT shown to be flat"
    return (
        f"{measure.name}: {trend.slope:+.3g} {measure.unit}, standard error {trend.error:.2g}: {verdict}, "
        f"where less than {measure.tolerance:g} counts as flat"
    )


def endless(files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the files again and again, each time with other ids, for which other views are drawn."""
    turn = 0
    while True:
        for file in files:
            yield f"{turn}/{file.parent.name}/{file.name}", file
        turn += 1


def sample_at(seconds: float, pictures: int) -> Sample:
    """Measure the memory, without objects that nothing refers to any more."""
    gc.collect()
    return Sample(
        round(seconds, 1), round(time.process_time(), 1), pictures, round(resident_mib(), 2), allocated_bytes(),
        sys.getallocatedblocks(),
    )  # fmt: skip


def stream(predictor: TestTimePredictor, files: Sequence[Path], seconds: float, every: float) -> Iterator[Sample]:
    """Predict pictures for some seconds, and yield a sample now and then."""
    start, pictures = time.monotonic(), 0
    next_time = 0.0
    with closing(predictor.stream(endless(files))) as predictions:
        while True:
            passed = time.monotonic() - start
            if passed >= next_time:
                yield sample_at(passed, pictures)
                next_time = passed + every
            if passed >= seconds:
                return
            next(predictions)
            pictures += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Stream, and print the table and what grows. Returns 0 if all figures are flat, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=3600, help="how long to stream, by default 3600")
    parser.add_argument("--every", type=float, default=60, help="the seconds between two figures, by default 60")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads, by default 1")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode and cut views, by default 0")
    parser.add_argument("--log", type=Path, help="a file to which each figure is appended as a line of JSON at once")
    options = parser.parse_args(arguments)
    if not options.seconds >= 8 * options.every > 0:
        parser.error("argument --seconds: a slope needs 8 figures or more")
    keep_freed_memory()  # as the commands do
    torch.set_num_threads(options.threads)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "world"
        world.write_imagefolder(root, PICTURES_PER_CLASS, 0, "mixed")
        predictor = TestTimePredictor("embedded", world.class_names(), workers=options.workers)
        for sample in stream(predictor, sorted(root.glob("*/*.png")), options.seconds, options.every):
            samples.append(sample)
            if options.log is not None:
                with options.log.open("a") as log:
                    print(json.dumps(sample._asdict()), file=log)
    rows = [
        [f"{one.seconds / 60:.1f}", f"{one.processor_seconds / 60:.1f}", str(one.pictures), f"{one.resident_mib:.2f}",
         "-" if one.allocated_bytes is None else str(one.allocated_bytes), str(one.python_blocks)]
        for one in samples
    ]  # fmt: skip
    names = ("minutes", "of the processor", "pictures", "resident MiB", "bytes in use", "blocks of Python")
    print("\n".join(table.aligned(names, rows, left=())))
    trends = [(measure, trend) for measure in MEASURES if (trend := trend_of(samples, measure)) is not None]
    for measure, trend in trends:
        print(sentence(measure, trend))
    rise = resident_rise(samples)
    print(f"resident memory: at most {rise:.2%} more than after the warm-up, where {MOST_RISE:.0%} counts as flat")
    return 0 if rise <= MOST_RISE and all(is_flat(measure, trend) for measure, trend in trends) else 1


if __name__ == "__main__":
    sys.exit(main())
