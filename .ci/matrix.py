"""Try the promised versions of Python, PyTorch and Triton, each set of them in a fresh environment.

    make matrix                                     # everything: about fifteen minutes for each set on two cores
    make matrix MATRIX="--sets oldest newest --tests tests/kernels tests/ops"

The steps of a set are: make the environment, build the CPU extension, build the CUDA library, compile the adapter with
torch.compile in one graph, run the tests. A step that fails becomes an entry of the table, and the next one is tried if
it can be. Steps that are finished for the same sources are not repeated, so a run that was cut off goes on.

OUTPUT/matrix.jsonl has a line for each step, OUTPUT/table.md the table, and OUTPUT/logs the output of each step. An
environment takes about 5 GB, and is removed after its set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEVELOPMENT = PROJECT["optional-dependencies"]["dev"]
NOT_FOR_TESTS = ("torch", "torchvision", "ruff", "mypy", "pre-commit")


@dataclass(frozen=True)
class VersionSet:
    """One set of versions.

    python: its minor version, such as 3.11.
    packages: what pip installs besides the project's dependencies; of a name without a version, the newest release.
    """

    python: str
    packages: tuple[str, ...]


SETS = {
    "oldest": VersionSet("3.11", ("torch==2.8.0", "torchvision==0.23.0")),
    "2.11": VersionSet("3.12", ("torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0")),
    "pinned": VersionSet("3.11", tuple(name for name in DEVELOPMENT if re.match(r"torch(vision)?==", name))),
    "newest": VersionSet("3.13", ("torch", "torchvision")),
}
STEPS = ("environment", "cpu", "cuda", "compile", "tests")

VERSIONS = """
import importlib.metadata, json, platform
names = ("torch", "triton", "torchvision", "numpy")
print(json.dumps({"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}))
"""
LOADED = "from rada_fast.extension import libraries; print(libraries.{}() or 'usable')"
REFUSED = "from rada_fast.extension.cuda_toolkit import torch_refusal as r; print(r() or '')"
COMPILED = """
import torch, rada_fast
from torch.nn.functional import normalize
torch.manual_seed(0)
adapter = rada_fast.RationalAdapter(rada_fast.AdapterConfig.official(64))
torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
compiled = torch.compile(adapter, fullgraph=True)
image, text = (normalize(torch.randn(rows, 64), dim=-1) for rows in (3, 17))
for backend in ("auto", "reference"):
    with rada_fast.use_backend(backend):
        ours, plain = compiled(image, text, 100.0), adapter(image, text, 100.0)
        ours.square().sum().backward()
    error = float((ours - plain).norm() / plain.norm())
    assert error < 1e-5, (backend, error)
print("auto and reference, forward and backward")
"""


class Matrix:
    """One run: its folder, its records, and its steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output.resolve()
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self.lines = self.output / "matrix.jsonl"
        self.sources = _sources()

    def records(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The newest record of each set and step for these sources and tests, without a line that was cut off."""
        found = {}
        for line in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["sources"] == self.sources and record.get("tests", self.options.tests) == self.options.tests:
                found[record["set"], record["step"]] = record
        return found

    def run(self) -> int:
        for name in self.options.sets:
            finished = {step for (of, step), record in self.records().items() if of == name}
            if finished >= set(STEPS):
                print(f"matrix: {name} is finished for these sources")
                continue
            for step in STEPS:
                # An environment that was left incomplete or removed is made again for the remaining steps.
                if step not in finished or (step == "environment" and not self.ready(name)):
                    self.do(name, step)
                    if step == "environment" and not self.ready(name):
                        break
            if not self.options.keep:
                shutil.rmtree(self.environment(name), ignore_errors=True)
            self.write_table()
        print(self.write_table())
        wanted = [self.records().get((name, step)) for name in self.options.sets for step in STEPS]
        return 0 if all(record and record["status"] != "failed" for record in wanted) else 1

    def environment(self, name: str) -> Path:
        return self.output / "environments" / name

    def ready(self, name: str) -> bool:
        return (self.environment(name) / "ready").exists()

    def do(self, name: str, step: str) -> None:
        print(f"matrix: {name}: {step} ...", flush=True)
        start = time.monotonic()
        try:
            status, message = getattr(self, f"_{step}")(name)
        except Exception as error:  # a step that fails becomes an entry of the table
            status, message = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        record = {
            "set": name, "step": step, "status": status, "message": message,
            "seconds": round(time.monotonic() - start, 1), "sources": self.sources,
        }  # fmt: skip
        if step == "tests":
            record["tests"] = self.options.tests
        if step == "environment" and status == "ok":
            record |= json.loads(self.python(name, step, "-c", VERSIONS)[1])
        with self.lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"matrix: {name}: {step}: {status}, {message} ({record['seconds']} s)", flush=True)

    def command(self, name: str, step: str, *words: str, **variables: str) -> tuple[int, str]:
        """Run a command for a step, and add its output to the step's log. Returns its exit status and its output."""
        # A configuration file of pip could constrain the versions that are asked for here.
        environment = os.environ | {"PIP_CONFIG_FILE": os.devnull} | variables
        done = subprocess.run(
            words, cwd=ROOT, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        with (self.output / "logs" / f"{name}-{step}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n{done.stdout}\n")
        return done.returncode, done.stdout.strip()

    def python(self, name: str, step: str, *words: str, **variables: str) -> tuple[int, str]:
        status, output = self.command(name, step, str(self.environment(name) / "bin" / "python"), *words, **variables)
        return status, output if step == "tests" else (output.splitlines() or [""])[-1]

    def _environment(self, name: str) -> tuple[str, str]:
        chosen, folder = SETS[name], self.environment(name)
        shutil.rmtree(folder, ignore_errors=True)
        interpreter = _interpreter(chosen.python)
        status, output = self.command(name, "environment", interpreter, "-m", "venv", str(folder))
        if status == 0:
            tools = [entry for entry in DEVELOPMENT if re.split(r"[^\w-]", entry)[0] not in NOT_FOR_TESTS]
            packages = [*chosen.packages, *tools, "--editable", "."]
            status, output = self.python(name, "environment", "-m", "pip", "install", "--no-compile", *packages)
        if status:
            return "failed", output
        (folder / "ready").touch()
        return "ok", " ".join(chosen.packages)

    def _cpu(self, name: str) -> tuple[str, str]:
        self.python(name, "cpu", "-m", "rada_fast", "build", USE_CUDA="0")
        _, reason = self.python(name, "cpu", "-c", LOADED.format("load"))
        return "ok" if reason == "usable" else "failed", reason

    def _cuda(self, name: str) -> tuple[str, str]:
        refused = self.python(name, "cuda", "-c", REFUSED)[1]
        if refused:
            return "without", refused
        # One architecture is enough to show that the sources compile; continuous integration builds the others.
        _, built = self.python(name, "cuda", "-m", "rada_fast", "build", TORCH_CUDA_ARCH_LIST="8.0")
        _, reason = self.python(name, "cuda", "-c", LOADED.format("load_cuda"))
        return ("ok", reason) if reason == "usable" else ("failed", f"{reason} ({built})")

    def _compile(self, name: str) -> tuple[str, str]:
        status, output = self.python(name, "compile", "-c", COMPILED)
        return "failed" if status else "ok", output

    def _tests(self, name: str) -> tuple[str, str]:
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *self.options.pytest.split(), *self.options.tests]
        status, output = self.python(name, "tests", *words)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?|xfailed|xpassed)", (output.splitlines() or [""])[-1])
        return "failed" if status else "ok", ", ".join(counts) or (output.splitlines() or ["no output"])[-1]

    def write_table(self) -> str:
        """Write the table of the records, which the documentation shows. Returns its text."""
        records = self.records()
        rows = [
            "| set | Python | torch | Triton | CPU extension | CUDA library | torch.compile | tests |",
            "| --- " * 8 + "|",
        ]
        for name in SETS:
            of = {step: records[name, step] for step in STEPS if (name, step) in records}
            versions = of.get("environment", {})
            shown = [str(versions.get(key, "-")).partition("+")[0] for key in ("python", "torch", "triton")]
            for step in ("cpu", "cuda", "compile", "tests"):
                record = of.get(step, {"status": "not tried", "message": ""})
                shown.append(record["message"] if step == "tests" and record["message"] else record["status"])
            rows.append(f"| {' | '.join([name, *shown])} |")
        text = "\n".join(rows) + "\n"
        (self.output / "table.md").write_text(text, encoding="utf-8")
        return text


def _sources() -> str:
    """A digest of the commit and of the changes since."""
    digest = hashlib.sha256()
    for command in (["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD"]):
        digest.update(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return digest.hexdigest()[:16]


def _interpreter(version: str) -> str:
    """The path of a Python of that minor version, found on PATH or among those of pyenv."""
    on_path = shutil.which(f"python{version}")
    others = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in ([on_path] if on_path else []) + [str(path) for path in others]:
        asked = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    raise FileNotFoundError(f"there is no Python {version} on PATH or among those of pyenv")


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the promised versions, each set in an environment of its own.")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="all by default")
    parser.add_argument(
        "--tests", nargs="+", default=["tests"], help="files or folders of tests; all of them by default"
    )
    parser.add_argument(
        "--pytest", default="-n 2 --dist worksteal", help="further options of pytest, in quotes: --pytest='-n 4'"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "matrix", help="the folder of all results")
    parser.add_argument("--keep", action="store_true", help="keep the environments, about 5 GB each")
    return Matrix(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
