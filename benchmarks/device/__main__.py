"""Run tests and benchmarks on a GPU machine step by step: ``python -m benchmarks.device [STAGE or STEP...]``.

run.sh prepares the machine and calls this; README.md explains both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.device.facts import output_of
from benchmarks.device.plan import PLAN, chosen
from benchmarks.device.report import summary
from benchmarks.device.runner import Runner

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("rada_fast", "kernels", "csrc", "tests", "benchmarks")
STATE = ("run.json", "facts.json", "steps.jsonl", "tests.jsonl", "figures.jsonl", "failures.txt", "summary.txt", "logs")


def identity() -> dict[str, str]:
    """The sources, versions and devices of this run: the results of a run with others are not its own."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".ini") and path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode())
            digest.update(path.read_bytes())
    found = {"sources": digest.hexdigest()[:16], "python": sys.version.split()[0]}
    found["devices"] = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "none"
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def set_aside(output: Path, now: dict[str, str], afresh: bool) -> str | None:
    """Move results of other sources, versions or devices into a folder of their own.

    afresh: move them in any case. Returns a line that says what was moved, or None.
    """
    kept = output / "run.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    message = None
    if before is not None and (before != now or afresh):
        place = next(place for at in range(1, 10**6) if not (place := output / f"earlier-{at}").exists())
        place.mkdir()
        for name in STATE:
            if (output / name).exists():
                shutil.move(output / name, place / name)
        changed = ", ".join(name for name in now if before.get(name) != now[name]) or "nothing, but --fresh was given"
        message = f"the earlier results are in {place} now; changed since: {changed}"
    output.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(now) + "\n", encoding="utf-8")
    return message


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description="Run tests and benchmarks on a GPU machine step by step; see benchmarks/device/README.md.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="STAGE|STEP", help="what to run; without any, all steps of the plan"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "device", help="the folder of all results")
    parser.add_argument(
        "--copy-to", type=Path, help="another folder, which gets a copy of the results after every step"
    )
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds; steps that do not fit wait for the next run"
    )
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, len(os.sched_getaffinity(0)) // 2)),
        help="processes that share the tests of a step; half the processors, at most 8, by default",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start anew; earlier results are moved aside")
    parser.add_argument("--again", action="store_true", help="run the named steps again, even if they are finished")
    parser.add_argument("--plan", action="store_true", help="list the steps, and run none")
    options = parser.parse_args(arguments)
    try:
        steps = chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.plan:
        for step in PLAN:
            print(f"{step.name:16} {step.limit:4.0f} s at most  {step.about}")
        return 0
    if message := set_aside(options.output, identity(), options.fresh):
        print(message)
    # A signal that ends this run must end the step in progress too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runner = Runner(ROOT, options.output, options.budget, lambda line: print(line, flush=True), options.jobs)
    if options.again:
        runner.forget(steps)
    results, text = [], ""
    for step in steps:
        results += runner.run([step])
        text = summary(results, runner.read("tests.jsonl"), runner.read("figures.jsonl"))
        (options.output / "summary.txt").write_text(text + "\n", encoding="utf-8")
        if options.copy_to is not None:
            shutil.copytree(options.output, options.copy_to, dirs_exist_ok=True)
    print(f"\n{text}\n\nfiles: {options.copy_to or options.output}")
    states = {result.state for result in results}
    return 1 if "failed" in states else 3 if "unfinished" in states else 0


if __name__ == "__main__":
    sys.exit(main())
