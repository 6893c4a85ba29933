"""Plants the listed bugs one at a time in a copy of the checkout, and reports which of them the tests catch.

Run it with `make mutants`, or `make mutants ONLY="some of the names"`. The copy lies in results/mutants/ and keeps its
build, so that a bug in C++ costs the compilation of what it touches. Every outcome is a line of results/mutants.jsonl,
which is written at once: a run that was cut off goes on where it stopped. An outcome holds until its entry, its source
or its tests change.

With `--drawn COUNT`, bugs that are drawn at random take the place of the listed ones; see drawn.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from tests.mutants.drawn import draw
from tests.mutants.entries import ROOT, EntryError, Mutant, content_hash, read, tests_key

COMPILED = ("csrc/cpu/", "csrc/shared/", "csrc/ops.cpp")
"""Where the sources of the CPU library lie. The simulator compiles those of csrc/cuda itself."""
SOURCES = ("csrc", "kernels", "rada_fast")
"""The folders whose content decides whether tests pass without a bug."""
BROKEN = 2
"""The exit status where an entry cannot be used or its tests do not pass without the bug."""


class Copy:
    """A copy of the checkout, with a build of its own, in which one bug at a time is planted."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.root, self.built, self.timeout = folder / "checkout", folder / "built", timeout
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "USE_CUDA": "0",
            "OMP_WAIT_POLICY": "passive",
            "RADA_FAST_CACHE": str(folder / "cache"),
        }

    def refresh(self) -> None:
        """Copy what differs from the checkout. Other files keep their times, so that they are not compiled again."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        wanted = {path for path in listed if path and (ROOT / path).is_file()}
        for path in sorted(self.root.rglob("*")) if self.root.is_dir() else []:
            relative = path.relative_to(self.root)
            if path.is_file() and relative.parts[0] != "build" and str(relative) not in wanted:
                path.unlink()
        for path in sorted(wanted):
            target = self.root / path
            if not target.is_file() or target.read_bytes() != (ROOT / path).read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, target)
        # What lies beside the checkout: the simulator and published vectors.
        shared = self.root.parent / "shared"
        if not shared.exists() and (ROOT.parent / "shared").is_dir():
            shared.symlink_to((ROOT.parent / "shared").resolve())

    def build(self) -> str | None:
        """Compile what changed. Returns the compiler's words where it fails."""
        done = self._run([sys.executable, "-m", "rada_fast", "build"], None)
        return None if done.returncode == 0 else done.stdout[-2000:]

    def keep_build(self) -> None:
        """Remember the build: `restore` brings it back, objects and times."""
        shutil.rmtree(self.built, ignore_errors=True)
        shutil.copytree(self.root / "build", self.built)

    def restore(self, mutant: Mutant, source: bytes, times: tuple[int, int]) -> None:
        """Take a bug out again, and what was compiled of it."""
        (self.root / mutant.file).write_bytes(source)
        os.utime(self.root / mutant.file, ns=times)
        if mutant.file.startswith(COMPILED):
            shutil.rmtree(self.root / "build", ignore_errors=True)
            shutil.copytree(self.built, self.root / "build")

    def test(self, arguments: list[str], *, stop: bool = True) -> tuple[str, str]:
        """Run tests, with stop up to the first that fails.

        Returns passed, failed, skipped, timeout or broken; and the tests that failed, or pytest's last words.
        """
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(["-x"] if stop else []),
            *arguments,
        ]
        try:
            done = self._run(command, self.timeout if stop else None)
        except subprocess.TimeoutExpired:
            return "timeout", f"no end within {self.timeout:.0f} s"
        lines = done.stdout.strip().splitlines() or [""]
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 0:
            return ("passed" if re.search(r"\d+ passed", lines[-1]) else "skipped"), lines[-1]
        if done.returncode == 1 or done.returncode < 0:  # less than 0: a signal, such as that of a wrong address
            return "failed", " ".join(failed) or lines[-1]
        return "broken", "\n".join(lines[-5:])

    def _run(self, command: list[str], timeout: float | None) -> subprocess.CompletedProcess[str]:
        with subprocess.Popen(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:
                # The tests' own children too.
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, output)


def outcome_of(copy: Copy, mutant: Mutant) -> tuple[str, str]:
    """Plant a bug and run its tests. Returns caught, survived, skipped or broken, and what showed it."""
    place = copy.root / mutant.file
    source, stat = place.read_bytes(), place.stat()
    try:
        place.write_text(mutant.planted(copy.root), encoding="utf-8")
        if mutant.file.startswith(COMPILED) and (words := copy.build()):
            return "broken", f"it does not compile: {words}"
        found, words = copy.test(list(mutant.tests))
    finally:
        copy.restore(mutant, source, (stat.st_atime_ns, stat.st_mtime_ns))
    return {"failed": "caught", "timeout": "caught", "passed": "survived"}.get(found, found), words


def known_outcomes(path: Path) -> dict[str, dict[str, object]]:
    """The outcomes of earlier runs by their keys. A line that was cut off counts as absent."""
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            outcome = json.loads(line)
            known[outcome["key"]] = outcome
        except (ValueError, KeyError):
            continue
    return known


def write_line(path: Path, outcome: dict[str, object]) -> None:
    """Add an outcome to the file of outcomes, at once."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(outcome) + "\n")


def print_table(outcomes: list[tuple[Mutant, dict[str, object]]]) -> None:
    """Print a line for each bug, and the counts."""
    width = max(len(mutant.name) for mutant, _ in outcomes)
    print(f"\n{'bug':{width}}  {'kind':13}  {'outcome':10}  {'s':>5}  file")
    counts: dict[str, int] = {}
    for mutant, outcome in outcomes:
        word = str(outcome["outcome"])
        if word == "survived" and mutant.equivalent:
            word = "equivalent"
        counts[word] = counts.get(word, 0) + 1
        print(f"{mutant.name:{width}}  {mutant.kind:13}  {word:10}  {outcome['seconds']:5.0f}  {mutant.file}")
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))


def main() -> int:
    """Run the command. Returns 0 where every bug is caught or argued equivalent, and 1 where one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*",
        help="the bugs to plant, with wildcards, or all; with --drawn: with what the paths of their sources begin",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="do not take outcomes from earlier runs")
    parser.add_argument("--drawn", type=int, metavar="COUNT", help="plant this many bugs that are drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="which bugs are drawn")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds; tests that take longer fail")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a bug is taken out again
    try:
        mutants = draw(options.names, options.drawn, options.seed) if options.drawn else read()
        for mutant in mutants:
            mutant.planted(ROOT)
    except EntryError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return BROKEN
    names = [] if options.drawn else options.names
    for name in names:
        if not any(fnmatch(mutant.name, name) for mutant in mutants):
            print(f"mutants: no entry is named {name}", file=sys.stderr)
            return BROKEN
    if names:
        mutants = [mutant for mutant in mutants if any(fnmatch(mutant.name, name) for name in names)]

    results = ROOT / "results" / "mutants.jsonl"
    results.parent.mkdir(exist_ok=True)
    known = {} if options.again else known_outcomes(results)
    # Of the files as they are now: what is edited while the bugs are planted counts for the next run.
    keys = {mutant.name: mutant.key(ROOT) for mutant in mutants}
    outcomes = {name: known[key] for name, key in keys.items() if key in known}
    missing = [mutant for mutant in mutants if mutant.name not in outcomes]
    failing: set[str] = set()  # tests that fail without a bug
    if missing:
        copy = Copy(ROOT / "results" / "mutants", options.timeout)
        copy.refresh()
        if any(mutant.file.startswith(COMPILED) for mutant in missing):
            if words := copy.build():
                print(f"mutants: the extension does not compile without a bug: {words}", file=sys.stderr)
                return BROKEN
            copy.keep_build()
        # A test that fails anyway would catch everything. What passed once is not run again until something changes.
        sources = (path for top in SOURCES for path in (ROOT / top).rglob("*") if path.is_file())
        code = content_hash(sorted(path for path in sources if "__pycache__" not in path.parts))
        test_keys = {test: tests_key(test, code) for mutant in missing for test in mutant.tests}
        fresh = [test for test, key in sorted(test_keys.items()) if key not in known]
        print(f"mutants: {len(missing)} to plant; first {len(fresh)} of their tests without a bug", flush=True)
        if fresh:
            found, words = copy.test(fresh, stop=False)
            failing = {test for test in fresh if any(name.startswith(test) for name in words.split())}
            if found == "broken" or (found == "failed" and not failing):
                print(f"mutants: without a bug the tests end as {found}: {words}", file=sys.stderr)
                return BROKEN
            for test in set(fresh) - failing:
                write_line(results, {"name": test, "outcome": "passed", "key": test_keys[test]})
    for mutant in missing:
        start = time.monotonic()
        if failing.isdisjoint(mutant.tests):
            word, words = outcome_of(copy, mutant)
        else:
            word, words = "broken", f"without the bug it fails too: {' '.join(failing.intersection(mutant.tests))}"
        outcome = {
            "name": mutant.name, "file": mutant.file, "kind": mutant.kind, "outcome": word, "by": words,
            "seconds": round(time.monotonic() - start, 1), "text": mutant.text, "becomes": mutant.becomes,
            "key": keys[mutant.name],
        }  # fmt: skip
        outcomes[mutant.name] = outcome
        if word != "broken":
            write_line(results, outcome)
        print(f"mutants: {word:8} {mutant.name} ({outcome['seconds']:.0f} s) {words}", flush=True)
    print_table([(mutant, outcomes[mutant.name]) for mutant in mutants])
    if any(outcome["outcome"] == "broken" for outcome in outcomes.values()):
        return BROKEN
    return int(any(outcomes[mutant.name]["outcome"] != "caught" and not mutant.equivalent for mutant in mutants))


if __name__ == "__main__":
    sys.exit(main())
