"""Plot how time and memory of a training step grow with the number of classes, for every provider of the adapter.

    python -m benchmarks.plot_scaling --output results/scaling [--batch 1] [--dtype float32] [--classes 50 100 200]

The folder receives scaling.png, with logarithmic axes, and scaling.json, with the rows of figures.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.bench_rational_adapter import case_of
from rada_fast.bench.adapter import Problem, providers_of

CLASSES = (50, 100, 200, 400, 800, 1600, 4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/scaling"), help="the folder for both files")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes K")
    parser.add_argument("--batch", type=int, default=1, help="images B")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--preset", choices=["official", "paper"], default="official")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    rows = []
    for classes in options.classes:
        problem = Problem(
            options.batch, classes, options.preset, options.dtype, backward=True, device=timing.default_device()
        )
        found = timing.measure(case_of(problem, providers_of(problem)))
        rows += found
        print(classes, {row["provider"]: round(row["best_ms"], 2) for row in found}, flush=True)
    (options.output / "scaling.json").write_text(json.dumps(rows, indent=2) + "\n")

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(f"forward and backward, {options.preset}, B = {options.batch}, D = 512, {options.dtype}")
    for axes, key, label in zip(figure.subplots(1, 2), ("best_ms", "extra_mib"), ("ms", "MiB"), strict=True):
        for name in dict.fromkeys(row["provider"] for row in rows):
            points = [(row["classes"], row[key]) for row in rows if row["provider"] == name and row[key]]
            if points:
                x, y = zip(*points, strict=True)
                slope = math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2]) if len(points) > 1 else float("nan")
                axes.loglog(x, y, marker="o", label=f"{name}, K^{slope:.1f} at the end")
        axes.set_xlabel("classes K")
        axes.set_ylabel({"ms": "best time, ms", "MiB": "peak extra memory, MiB"}[label])
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.savefig(options.output / "scaling.png", dpi=110)
    print(options.output / "scaling.png")


if __name__ == "__main__":
    main()
