"""Runs the steps of a plan in processes of their own, so that no test fails because of another.

A test that crashes its process, hangs or breaks the device is recorded as such, and a new process runs the tests after
it. Every result is written as soon as it is known: a run that is cut off loses only the test in progress, and the next
run goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device.plan import Step

MAX_PROCESSES = 8
"""The most processes of one step, one after the other. Where so many tests break their process, the others would say no
more."""
MIN_SECONDS = 10.0
"""A step is not started if less time is left: importing PyTorch takes most of it."""
SECONDS_TO_START = 60.0
"""A process may take this long before its first test: it imports PyTorch and the tests, perhaps from a cold disk."""
COUNTED = ("passed", "failed", "error", "crashed", "hung", "skipped")
BAD = ("failed", "error", "crashed", "hung")


@dataclass
class Result:
    """The result of a step.

    state: passed, failed, skipped (all its tests are), no device, or unfinished (the time was over).
    counts: how many tests had which outcome.
    message: the first line of the first error, or what a command's output shows.
    """

    step: str
    state: str = "passed"
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    message: str = ""


class Runner:
    """Runs steps and keeps their results.

    root: the folder of the checkout.
    output: the folder of all results.
    budget: the seconds for all steps of this run.
    echo: prints a line of progress.
    jobs: the processes among which the tests of a step are shared out. Most of their time goes into compiling, which
        leaves the device idle. A benchmark always has one process, and the device to itself.
    """

    def __init__(
        self, root: Path, output: Path, budget: float, echo: Callable[[str], None] = print, jobs: int = 1
    ) -> None:
        self.root, self.output, self.echo, self.jobs = root, output.resolve(), echo, jobs
        self.lock = threading.Lock()
        self.deadline = time.monotonic() + budget
        (self.output / "logs").mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a file of JSON lines, without a last one that was cut off."""
        path = self.output / name
        records = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def append(self, name: str, record: dict[str, Any]) -> None:
        with self.lock, (self.output / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget(self, steps: Sequence[Step]) -> None:
        """Remove the records of steps, so that they run again. Their figures and logs stay."""
        names = {step.name for step in steps}
        for file in ("steps.jsonl", "tests.jsonl"):
            kept = [record for record in self.read(file) if record["step"] not in names]
            fresh = self.output / f"{file}.new"
            fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            fresh.replace(self.output / file)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def has_device(self) -> bool:
        """False only if the facts say so; before they are known, every step finds out by itself."""
        path = self.output / "facts.json"
        return not path.is_file() or bool(json.loads(path.read_text(encoding="utf-8"))["devices"])

    def environment(self) -> dict[str, str]:
        """This process's variables, with the machine's devices as those to build for unless a variable names others.

        Processes that run at once share the processors: if each had a thread for every one, all would wait for all.
        """
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | os.environ
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        path = self.output / "facts.json"
        devices = json.loads(path.read_text(encoding="utf-8"))["devices"] if path.is_file() else []
        if devices:
            capabilities = sorted({device["capability"] for device in devices})
            environment.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(capabilities))
        return environment

    def run(self, steps: Sequence[Step]) -> list[Result]:
        """Run the steps that no earlier run has finished. The result of a step is written once it is final."""
        known = {record["step"]: Result(**record) for record in self.read("steps.jsonl")}
        results = []
        for step in steps:
            if step.name in known:
                results.append(known[step.name])
                self.echo(f"-- {step.name}: {known[step.name].state} in an earlier run")
                continue
            if self.left < MIN_SECONDS:
                results.append(
                    Result(step.name, "unfinished", message="no time was left; the same command will run it")
                )
                continue
            self.echo(f"-- {step.name}: {step.about}")
            start = time.monotonic()
            if step.stage == "bench" and not self.has_device:
                result = Result(step.name, "no device", message="this measures a CUDA device, and none is visible")
            elif step.uses_pytest:
                result = self.tests(step)
            else:
                result = self.command(step)
            result.seconds = round(time.monotonic() - start, 1)
            if result.state != "unfinished":
                self.append("steps.jsonl", asdict(result))
            self.echo(f"   {result.state} in {result.seconds:.0f} s {words(result.counts)} {result.message}".rstrip())
            results.append(result)
        return results

    def start(self, step: Step, *more: str) -> subprocess.Popen[bytes]:
        arguments = [part.replace("{output}", str(self.output)) for part in (*step.arguments, *more)]
        with (self.output / "logs" / f"{step.name}.log").open("ab") as log:
            # In a session of its own, so that all that it starts can be ended with it.
            return subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.root, env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def log(self, step: Step) -> str:
        path = self.output / "logs" / f"{step.name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def command(self, step: Step) -> Result:
        limit = min(step.limit, self.left)
        (self.output / "logs" / f"{step.name}.log").unlink(missing_ok=True)
        process = self.start(step)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            if limit < step.limit:
                return Result(step.name, "unfinished", message="out of time")
            return Result(step.name, "failed", message=f"hung: killed after {limit:.0f} s")
        finally:
            end(process)
        text = self.log(step)
        if status:
            return Result(step.name, "failed", message=f"{ended(status)}: {last_line(text)}")
        shown = (
            [match.group().strip(" :") for match in re.finditer(step.shown, text, re.MULTILINE)] if step.shown else []
        )
        return Result(step.name, message=", ".join(dict.fromkeys(shown)))

    def tests(self, step: Step) -> Result:
        """Run the tests of a step, in several processes at once, until each has an outcome or the time is over."""
        until = time.monotonic() + min(step.limit, self.left)
        short_of_time = self.left < step.limit
        jobs = 1 if step.stage == "bench" else self.jobs
        with ThreadPoolExecutor(jobs) as pool:
            endings = list(pool.map(lambda share: self.share(step, share, jobs, until), range(jobs)))
        unfinished = short_of_time and any(ending == "out of time" for ending, _ in endings)
        return self.verdict(step, next((trouble for _, trouble in endings if trouble), ""), unfinished)

    def share(self, step: Step, number: int, shares: int, until: float) -> tuple[str, str]:
        """Run one share of a step's tests, in one process after the other. Returns what ``watch`` does for the last."""
        events, without = (self.output / f"{name}-{number}" for name in ("events.jsonl", "without.txt"))
        arguments = ("--events", str(events), "--without", str(without), "--share", f"{number}/{shares}")
        for _ in range(MAX_PROCESSES):
            done = {record["test"] for record in self.read("tests.jsonl") if same_run(record["step"], step)}
            without.write_text("".join(f"{name}\n" for name in sorted(done)), encoding="utf-8")
            events.unlink(missing_ok=True)
            process = self.start(step, *arguments)
            try:
                ending, trouble = self.watch(step, process, events, until)
            finally:
                end(process)
            if ending != "broken":
                return ending, trouble
        return "dead", f"the other tests were left out after {MAX_PROCESSES} processes that broke"

    def watch(self, step: Step, process: subprocess.Popen[bytes], events: Path, until: float) -> tuple[str, str]:
        """Record the outcomes of a process's tests until it ends. Returns how it ended, and an explanation or "".

        It ended "finished", "broken" (a new process can run the other tests), "dead" (a new one would end in the same
        way), or "out of time".
        """
        known, running, since, ending = 0, "", time.monotonic(), ""
        while True:
            # This comes before the file is read, so that nothing is missed of a process that has ended.
            status = process.poll()
            lines = events.read_text(encoding="utf-8").split("\n")[:-1] if events.is_file() else []
            for line in lines[known:]:
                event = json.loads(line)
                kind = event.pop("event")
                known, since, running = known + 1, time.monotonic(), event["test"] if kind == "start" else ""
                if kind == "end":
                    self.outcome(step, **event)
                elif kind == "uncollected":
                    self.outcome(step, outcome="error", **event)
                elif kind in ("finished", "broken"):
                    ending = kind
            now = time.monotonic()
            patience = step.test_limit if known else max(step.test_limit, SECONDS_TO_START)
            if status is not None or now > until or now - since > patience:
                break
            time.sleep(0.05)
        if status is None:
            end(process)
        if running:
            if status is None and now > until:
                return "out of time", "out of time"
            if status is None:
                self.outcome(step, running, "hung", f"killed after {step.test_limit:.0f} s", ms=1e3 * step.test_limit)
            else:
                self.outcome(step, running, "crashed", ended(status), self.log(step)[-3000:])
            return "broken", ""
        if ending:
            return ending, ""
        if status is None:
            return ("out of time",) * 2 if now > until else ("dead", f"hung outside of a test for {patience:.0f} s")
        return "dead", f"{ended(status)}: {last_line(self.log(step))}"

    def outcome(self, step: Step, test: str, outcome: str, error: str = "", details: str = "", ms: float = 0.0) -> None:
        self.append("tests.jsonl", {"step": step.name, "test": test, "outcome": outcome, "ms": ms, "error": error})
        if details and outcome in BAD:
            with self.lock, (self.output / "failures.txt").open("a", encoding="utf-8") as file:
                file.write(f"{'=' * 100}\n{step.name}: {test}: {outcome}\n{details}\n\n")

    def verdict(self, step: Step, trouble: str, unfinished: bool) -> Result:
        # A file that cannot be imported has a record for each process that tried.
        records = list({one["test"]: one for one in self.read("tests.jsonl") if one["step"] == step.name}.values())
        counts = {name: sum(record["outcome"] == name for record in records) for name in COUNTED}
        counts = {name: count for name, count in counts.items() if count}
        first = next((record for record in records if record["outcome"] in BAD), None)
        message = f"{short(first['test'])}: {first['error']}" if first else trouble
        if unfinished:
            return Result(step.name, "unfinished", counts=counts, message=message)
        if first or trouble:
            return Result(step.name, "failed", counts=counts, message=message)
        if not counts:
            return Result(step.name, "skipped", message="no test was left for this step")
        if set(counts) == {"skipped"}:
            reasons = sorted({record["error"] for record in records})
            return Result(step.name, "skipped", counts=counts, message="; ".join(reasons))
        return Result(step.name, counts=counts)


def same_run(recorded: str, step: Step) -> bool:
    """Whether a test that a recorded step has run is done for this one; a benchmark is not, as its providers differ."""
    return recorded == step.name or (step.stage == "tests" and recorded.startswith("tests."))


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything that it has started and left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A driver that does not answer may keep a killed process alive for a while; there is no need to wait for that.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)


def ended(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def short(test: str) -> str:
    """The name of a test without its folders."""
    return test.rpartition("/")[2]


def words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
