"""Compare the benchmarks of two commits on this machine, with a test of whether they differ at all.

    make compare BASE=main CASES="select views"
    python -m benchmarks.compare --base HEAD~3 -k "select" --rounds 12

The sources of the base are unpacked below ``build/compare/`` and compiled there. Then both sides run the chosen
benchmarks in turn, in a fresh process each time: base, changed, changed, base, and so on. A process is one observation,
because times differ more from process to process than within one. Each round is a pair of observations that lie next to
each other in time, so that a machine that slows down slows both.

The table shows for every provider of every case the median of both sides, the ratio of the times base / changed with a
confidence interval of 95 %, and the probability that the pairs are as one-sided if nothing has changed: Wilcoxon's
exact signed-rank test, with Holm's correction for the number of rows. The baselines in plain PyTorch are rows like any
other. They are the same program on both sides, so that a difference there says that the machine was not quiet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import table
from rada_fast import _env

ROOT = Path(__file__).resolve().parents[1]
LEVEL = 0.05
"""A difference is named where its corrected probability is at most this."""
FIGURES = ("best_ms", "median_ms", "wall_ms", "extra_mib")

Key = tuple[str, str]
"""The names of a case and of a provider."""
Observations = dict[Key, float]
"""One process's figure of every row."""


class Comparison(NamedTuple):
    """What the pairs say about one row.

    base, changed: the medians of the two sides.
    ratio, low, high: the ratio base / changed with its interval; more than 1 says that the change is faster.
    probability: that the pairs are as one-sided if nothing has changed, corrected for the number of rows.
    """

    base: float
    changed: float
    ratio: float
    low: float
    high: float
    probability: float

    @property
    def verdict(self) -> str:
        if self.probability > LEVEL:
            return "no difference shown"
        return "better" if self.ratio > 1 else "worse"


def rank_sums(pairs: int) -> list[int]:
    """Count, for each sum of ranks from 0 to pairs (pairs + 1) / 2, the sets of ranks 1 .. pairs that have it."""
    counts = [1]
    for rank in range(1, pairs + 1):
        longer = counts + [0] * rank
        for total, count in enumerate(counts):
            longer[total + rank] += count
        counts = longer
    return counts


def signed_rank_probability(differences: Sequence[float]) -> float:
    """Return the two-sided probability of Wilcoxon's exact signed-rank test that the differences are about zero.

    Differences of zero are left out. Equal ones share the mean of their ranks, and the distribution is computed for
    these ranks, so that it is exact then too.
    """
    sizes = sorted(abs(one) for one in differences if one)
    # Twice the mean rank of each difference is a whole number.
    doubled = {size: 2 * sizes.index(size) + 1 + sizes.count(size) for size in sizes}
    counts = {0: 1}
    for size in sizes:
        rank = doubled[size]
        counts = {
            total: counts.get(total, 0) + counts.get(total - rank, 0)
            for total in {*counts, *(before + rank for before in counts)}
        }
    positive = sum(doubled[abs(one)] for one in differences if one > 0)
    all_ranks = sum(doubled[size] for size in sizes)
    smaller = min(positive, all_ranks - positive)
    tail = sum(count for total, count in counts.items() if total <= smaller)
    return float(min(1.0, 2 * tail / 2 ** len(sizes)))


def interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Return an estimate of the middle of the differences (Hodges and Lehmann) and its interval by the same test.

    With fewer than six pairs no interval of 95 % is finite.
    """
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2))
    counts, tail, left_out = rank_sums(len(differences)), 0, 0
    for count in counts:
        tail += count
        if 2 * tail > level * 2 ** len(differences):
            break
        left_out += 1
    if left_out == 0:
        return statistics.median(means), -math.inf, math.inf
    return statistics.median(means), means[left_out - 1], means[-left_out]


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return the probabilities corrected for their number (Holm), in the same order."""
    corrected, most = [0.0] * len(probabilities), 0.0
    for place, at in enumerate(sorted(range(len(probabilities)), key=lambda at: probabilities[at])):
        most = max(most, min(1.0, (len(probabilities) - place) * probabilities[at]))
        corrected[at] = most
    return corrected


def compared(base: Sequence[Observations], changed: Sequence[Observations]) -> dict[Key, Comparison]:
    """Compare the pairs of observations for every row that all processes have."""
    keys = [key for key in base[0] if all(key in one for one in (*base, *changed))]
    pairs = list(zip(base, changed, strict=True))
    logs = {key: [math.log(before[key] / after[key]) for before, after in pairs] for key in keys}
    corrected = holm([signed_rank_probability(logs[key]) for key in keys])
    found = {}
    for key, probability in zip(keys, corrected, strict=True):
        middle, low, high = (math.exp(value) if value < 700 else math.inf for value in interval(logs[key]))
        before, after = (statistics.median(one[key] for one in side) for side in (base, changed))
        found[key] = Comparison(before, after, middle, low, high, probability)
    return found


def lines_of(comparisons: dict[Key, Comparison], figure: str) -> list[str]:
    """Return the table as lines."""
    header = ["case", "provider", f"base {figure}", f"changed {figure}", "ratio", "95 % interval", "p (Holm)", ""]
    rows = [
        [
            *key,
            table.significant(one.base),
            table.significant(one.changed),
            table.number(one.ratio, 3),
            f"{one.low:.3f} .. {one.high:.3f}",
            f"{one.probability:.2g}",
            one.verdict,
        ]
        for key, one in comparisons.items()
    ]
    return table.aligned(header, rows, [0, 1, 7])


def unpacked(commit: str) -> Path:
    """Unpack the sources of a commit below build/compare/, unless they are there, and return their folder."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        sys.exit(f"compare: --base must be a commit, got {commit!r}: {found.stderr.strip()}")
    name = found.stdout.strip()
    folder = ROOT / "build" / "compare" / name[:12]
    if not (folder / "pyproject.toml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def in_sources(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of a folder, whatever is installed."""
    environment = _env.with_variables(PYTHONPATH=str(folder))
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def compile_in(folder: Path) -> None:
    """Build the extension of a side. A failure stops nothing, because the benchmarks then run on plain PyTorch."""
    print(f"compare: building in {folder}", flush=True)
    done = in_sources(folder, "-m", "rada_fast", "build")
    if done.returncode:
        print(f"compare: not built in {folder}: {(done.stderr or done.stdout).strip()[-300:]}", flush=True)


def observe(folder: Path, options: argparse.Namespace) -> Observations:
    """Run the chosen benchmarks of a side in a fresh process and return the figure of every row."""
    figures = ROOT / "build" / "compare" / f"figures-{os.getpid()}.jsonl"
    figures.unlink(missing_ok=True)
    command = [
        "-m",
        "pytest",
        "benchmarks",
        "-k",
        options.k,
        "--figures",
        str(figures),
        "--seconds",
        str(options.seconds),
    ]
    done = in_sources(folder, *command, "-q", "-p", "no:cacheprovider")
    if done.returncode or not figures.is_file():
        sys.exit(f"compare: the benchmarks failed in {folder}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
    figures.unlink()
    return {(row["case"], row["provider"]): row[options.figure] for row in rows if row.get(options.figure)}


def alternate(
    base: Path, changed: Path, rounds: int, run: Callable[[Path], Observations]
) -> tuple[list[Observations], list[Observations]]:
    """Run both sides once in every round. The first one of a round is the last one of the round before."""
    found: dict[Path, list[Observations]] = {base: [], changed: []}
    for number in range(rounds):
        for side in (base, changed) if number % 2 == 0 else (changed, base):
            found[side].append(run(side))
        print(f"compare: round {number + 1} of {rounds}", flush=True)
    return found[base], found[changed]


def missing(base: Iterable[Observations], changed: Iterable[Observations]) -> list[str]:
    """Return a line for each row that only one side has."""
    sides = {name: {key for one in side for key in one} for name, side in (("base", base), ("changed", changed))}
    return [
        f"only in {name}: {', '.join(key)}"
        for name, other in (("base", "changed"), ("changed", "base"))
        for key in sorted(sides[name] - sides[other])
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the commit to compare the working tree with")
    parser.add_argument("-k", default="", help="which benchmarks to run, as in pytest; all take very long")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of processes; at least 6; default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.3, help="about this long a provider is timed in a process")
    parser.add_argument("--figure", choices=FIGURES, default="best_ms", help="what is compared; default %(default)s")
    options = parser.parse_args(arguments)
    if options.rounds < 6:
        parser.error(f"--rounds must be 6 or more, as fewer pairs show nothing at 5 %, got {options.rounds}")
    base = unpacked(options.base)
    for side in (base, ROOT):
        compile_in(side)
    observations = alternate(base, ROOT, options.rounds, lambda side: observe(side, options))
    comparisons = compared(*observations)
    print()
    print("\n".join(lines_of(comparisons, options.figure) + missing(*observations)))


if __name__ == "__main__":
    main()
