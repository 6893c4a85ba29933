"""A tool for developers: whether the memory of test-time training stays flat while pictures stream through it.

    python -m benchmarks.streaming_memory --log memory.jsonl
    python -m benchmarks.streaming_memory --seconds 600 --every 10 --threads 2

It writes the shipped model's pictures to files and lets ``TestTimePredictor`` stream them again and again, each time
under other names and so with other views. Once a minute it writes down how much memory of the process is resident. At
the end it prints a table, and whether the slope of a straight line through the figures is zero within its noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
"""This share of the figures, the first ones, is left out of the slope: caches fill up, and the heap finds its size."""
MOST_AUTOCORRELATION = 0.95


class Sample(NamedTuple):
    """Hold what was measured at one time.

    seconds: the time since the start.
    processor_seconds: the time for which the process has computed, which is less where it was stopped.
    pictures: how many pictures have been predicted.
    resident_mib: the memory of the process that is resident.
    """

    seconds: float
    processor_seconds: float
    pictures: int
    resident_mib: float


class Trend(NamedTuple):
    """Hold the slope of a straight line in MiB an hour, and its standard error."""

    slope: float
    error: float

    @property
    def is_flat(self) -> bool:
        """Whether the slope is zero within twice its standard error."""
        return abs(self.slope) <= 2 * self.error

    def sentence(self) -> str:
        verdict = "flat: the slope is zero within its noise" if self.is_flat else "NOT flat"
        return f"{self.slope:+.2f} MiB an hour, standard error {self.error:.2f}: {verdict}"


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def trend_of(samples: Sequence[Sample]) -> Trend:
    """Fit a straight line to the samples after the warm-up.

    Memory grows in steps, so that neighbouring samples deviate from the line together. Its error is therefore computed
    as that of fewer samples, by the correlation between neighbours.
    """
    kept = samples[math.ceil(WARM_UP * len(samples)) :]
    if len(kept) < 4:
        raise ValueError(f"samples must be at least 5, got {len(samples)}")
    hours = torch.tensor([sample.seconds / 3600 for sample in kept], dtype=torch.float64)
    memory = torch.tensor([sample.resident_mib for sample in kept], dtype=torch.float64)
    hours, memory = hours - hours.mean(), memory - memory.mean()
    spread = float((hours**2).sum())
    slope = float((hours * memory).sum()) / spread
    residuals = memory - slope * hours
    squares = float((residuals**2).sum())
    correlation = float((residuals[1:] * residuals[:-1]).sum()) / squares if squares > 0 else 0.0
    correlation = min(max(correlation, 0.0), MOST_AUTOCORRELATION)
    fewer = (1 + correlation) / (1 - correlation)
    return Trend(slope, math.sqrt(fewer * squares / (len(kept) - 2) / spread))


def endless(files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the files again and again, each time with other ids, for which other views are drawn."""
    turn = 0
    while True:
        for file in files:
            yield f"{turn}/{file.parent.name}/{file.name}", file
        turn += 1


def stream(predictor: TestTimePredictor, files: Sequence[Path], seconds: float, every: float) -> Iterator[Sample]:
    """Predict pictures for some seconds, and yield a sample now and then."""
    start, pictures = time.monotonic(), 0
    next_time = 0.0
    with closing(predictor.stream(endless(files))) as predictions:
        while True:
            passed = time.monotonic() - start
            if passed >= next_time:
                yield Sample(round(passed, 1), round(time.process_time(), 1), pictures, round(resident_mib(), 2))
                next_time = passed + every
            if passed >= seconds:
                return
            next(predictions)
            pictures += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Stream, and print the table and the slope. Returns 0 if the memory is flat, else 1."""
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
    rows = [[f"{sample.seconds / 60:.1f}", f"{sample.processor_seconds / 60:.1f}", str(sample.pictures),
             f"{sample.resident_mib:.2f}"] for sample in samples]  # fmt: skip
    print("\n".join(table.aligned(("minutes", "of the processor", "pictures", "resident MiB"), rows, left=())))
    trend = trend_of(samples)
    print(trend.sentence())
    return 0 if trend.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
