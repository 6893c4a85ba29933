"""The build of the extension with ninja, and the wheel that carries its libraries.

Nothing else in the package compiles: ``build`` is the only function that does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rada_fast import _env
from rada_fast.config.tools import BuildOptions
from rada_fast.errors import UserError
from rada_fast.extension import cuda_toolkit, libraries
from rada_fast.extension.cuda_toolkit import Toolkit
from rada_fast.extension.libraries import CUDA_LIBRARY, LIBRARY, BuildParameters

LOCK_TIMEOUT = 600.0
"""The longest wait for another build of the same libraries, in seconds. A full build takes minutes on two cores."""
MEMORY_PER_JOB = 1.5 * 2**30
"""The memory that one compiler may take, in bytes. The largest source, with all of ATen's headers, took 1.1 GiB."""


@contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold an advisory lock. The system releases it when the process ends, so that a killed build blocks nobody."""
    import fcntl

    deadline = time.monotonic() + timeout
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    break  # the file system has no locks; no other build is assumed to run
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another build holds {path} for more than {timeout:.0f} s; try again later"
                    ) from None
                time.sleep(0.2)
        yield


def default_jobs() -> int:
    """Return how many compilers to run at once: one for each processor, or fewer if memory is short."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, int(_env.available_memory() // MEMORY_PER_JOB)))


def _ninja_text(parameters: BuildParameters, output: Path) -> str:
    def escape(text: str | Path) -> str:
        return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    shared, link = shlex.join(parameters.flags), shlex.join(parameters.link)
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        f"  command = {parameters.compiler} -MMD -MF $out.d {shared} $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {parameters.compiler} $in {link} -o $out",
    ]
    for source, name, own in parameters.sources:
        lines += [f"build {name}: compile {escape(source)}", f"  own = {shlex.join(own)}"]
    objects = " ".join(name for _, name, _ in parameters.sources)
    lines.append(f"build {escape(output)}: link {objects}")
    if isinstance(toolkit := parameters.cuda, Toolkit):
        version = f"-DTORCH_TARGET_VERSION=0x{cuda_toolkit.MIN_TORCH[0]:02x}{cuda_toolkit.MIN_TORCH[1]:02x}{0:012x}"
        headers = shlex.join(f"-isystem{folder}" for folder in toolkit.include)
        host = f"-ccbin={shutil.which(shlex.split(parameters.compiler)[0])}"
        debug = "-lineinfo" if _env.debug_build() else "-DNDEBUG"
        options = shlex.join(
            ["-std=c++17", "-O3", debug, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", host, *toolkit.flags]
        )
        lines += [
            "rule compile_cuda",
            f"  command = {shlex.quote(str(toolkit.nvcc))} -MMD -MF $out.d {options} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link_cuda",
            f"  command = {parameters.compiler} $in {shlex.join(parameters.cuda_link)} -o $out",
        ]
        for source, name in parameters.cuda_sources:
            lines.append(f"build {name}: compile_cuda {escape(source)}")
        for source, name in parameters.cuda_glue:
            lines += [f"build {name}: compile {escape(source)}", f"  own = -O2 -DUSE_CUDA {version} {headers}"]
        objects = " ".join(name for _, name in (*parameters.cuda_sources, *parameters.cuda_glue))
        lines.append(f"build {escape(output.with_name(CUDA_LIBRARY))}: link_cuda {objects}")
    return "\n".join([*lines, ""])


def _install(built: Path, library: Path, echo: Callable[[str], None]) -> None:
    """Move a library to its place with its SHA-256 beside it.

    It is renamed, because a library in use must not change under its readers. It does not stay among the objects: the
    next build links it again, as the file may have been damaged in the meantime.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    recorded = libraries.hash_file(library)
    for path in (library, recorded):
        if path.is_dir():
            aside = next(
                free for count in range(1000) if not (free := path.with_name(f"{path.name}.aside{count}")).exists()
            )
            path.rename(aside)
            echo(f"extension: {path} was a folder, which is now {aside}")
    with built.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    fresh = recorded.with_name(f"{recorded.name}.{os.getpid()}")
    try:
        fresh.write_text(f"{digest}  {library.name}\n", encoding="utf-8")
        fresh.replace(recorded)
    finally:
        fresh.unlink(missing_ok=True)
    built.replace(library)


def _is_current(library: Path, toolkit: Toolkit) -> bool:
    """Return whether a CUDA library contains all the device code that this toolkit would make."""
    code, _, compiler = libraries.build_note(library).partition(" by ")
    same = compiler.partition(" (")[0] == f"nvcc {toolkit.version}"
    return same and set(toolkit.device_code.split(", ")) <= set(code.split(", "))


def build(
    *, jobs: int | None = None, timeout: float = LOCK_TIMEOUT, echo: Callable[[str], None] = print, force: bool = False
) -> Path:
    """Compile the extension with ninja, once for each PyTorch version, Python interface, set of sources and of flags.

    The CUDA kernels go into a library of their own. It is built if nvcc is found, PyTorch was built with CUDA, and a
    device is there or TORCH_CUDA_ARCH_LIST or USE_CUDA=1 asks for it. Otherwise a message gives the reason and the rest
    is built; USE_CUDA=1 makes that an error, and USE_CUDA=0 leaves the kernels out.
    A library is up to date if its SHA-256 is the recorded one (see ``libraries.fault_of``); a damaged one is replaced.

    jobs: how many compilers run at once; None for as many as processors and memory allow.
    timeout: the longest wait for another build of the same libraries, in seconds.
    echo: receives the messages, one line each.
    force: compile even if the library exists.

    Returns the path of the CPU library. Raises UserError with the reason if it cannot be built.
    """
    if platform.system() != "Linux":
        raise UserError(f"the extension is built on Linux only, this is {platform.system()}; everything else works")
    parameters = libraries.build_parameters()
    toolkit = parameters.cuda
    cuda_words = f"CUDA kernels for {toolkit}" if isinstance(toolkit, Toolkit) else f"no CUDA kernels: {toolkit}"
    if _env.use_cuda() and not isinstance(toolkit, Toolkit):
        raise UserError(f"USE_CUDA=1 asks for CUDA kernels, which cannot be built: {toolkit}")
    (library, faults), (cuda_library, cuda_faults) = (libraries.search(cuda, carried=False) for cuda in (False, True))
    if cuda_library is not None and not isinstance(toolkit, Toolkit):
        cuda_words = f"CUDA kernels as built before, for {libraries.build_note(cuda_library)}"
    cuda_ready = not isinstance(toolkit, Toolkit) or (cuda_library is not None and _is_current(cuda_library, toolkit))
    if library is not None and cuda_ready and not force:
        echo(f"extension: up to date for {libraries.build_name()}, {cuda_words}: {library}")
        return library
    for fault in (*faults, *cuda_faults):
        echo(f"extension: {fault}; it is made again")
    place = libraries.build_folder()
    try:
        return _compile(parameters, place, cuda_words, jobs or default_jobs(), timeout, echo, force)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"the extension cannot be built in {place}: {error.strerror or error}{where}") from None


def _compile(
    parameters: BuildParameters,
    place: Path,
    cuda_words: str,
    jobs: int,
    timeout: float,
    echo: Callable[[str], None],
    force: bool,
) -> Path:
    library, cuda_library = libraries.library_in(place), libraries.library_in(place, cuda=True)
    with_cuda = isinstance(parameters.cuda, Toolkit)
    # If an environment is used without being activated, its ninja lies beside its Python.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    compiler = shutil.which(shlex.split(parameters.compiler)[0])
    if compiler is None:
        raise UserError(f"the extension needs a C++ compiler and found none ({parameters.compiler}); the rest works")
    if ninja is None:
        raise UserError("the extension needs ninja to be built and found none (pip install ninja); the rest works")
    work = place / "objects"
    work.mkdir(parents=True, exist_ok=True)
    copies = [name for _, name, _ in parameters.sources if name.startswith("adapter_loops_")]
    paths = ", ".join(name.removeprefix("adapter_loops_").removesuffix(".o") for name in copies)
    echo(
        f"extension: CPU kernels ({paths}) for {platform.machine()}, {libraries.build_name()}, {compiler}, {jobs} jobs"
    )
    echo(f"extension: {cuda_words}")
    start = time.monotonic()
    with _lock(place / "lock", timeout):
        (work / "build.ninja").write_text(_ninja_text(parameters, work / LIBRARY), encoding="utf-8")
        command = [ninja, "-C", str(work), "-j", str(jobs), "-k", "0"]
        if force:
            subprocess.run([*command, "-t", "clean"], capture_output=True, check=False)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode and not force and re.search(r"^FAILED: .*\.so\s*$", result.stdout, re.MULTILINE):
            # Sources that compile but do not link may have objects that an earlier build left incomplete.
            subprocess.run([*command, "-t", "clean"], capture_output=True, check=False)
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            echo(result.stdout[-4000:])
            if full := re.search(r"^.*No space left on device.*$", result.stdout, re.MULTILINE):
                raise UserError(f"the extension cannot be built in {place}: {full[0].strip()}")
            # The CPU library is built even if only the CUDA kernels do not compile.
            alone = [*command, str(work / LIBRARY)]
            if subprocess.run(alone, capture_output=True, check=False).returncode or _env.use_cuda():
                raise UserError(f"the extension did not compile (ninja -C {work} shows why)")
            echo(f"extension: the CUDA kernels did not compile (ninja -C {work} shows why); the CPU kernels did")
        elif with_cuda:
            _install(work / CUDA_LIBRARY, cuda_library, echo)
            cuda_library.with_suffix(".txt").write_text(f"{parameters.cuda}\n", encoding="utf-8")
        _install(work / LIBRARY, library, echo)
    echo(f"extension: built in {time.monotonic() - start:.0f} s: {library}")
    return library


def run_build(options: BuildOptions) -> int:
    """Run the command: compile the extension as its options say. Returns the exit status."""
    build(jobs=options.jobs, timeout=options.timeout, force=options.force)
    return 0


def build_wheel(output: Path | str = "dist", *, echo: Callable[[str], None] = print) -> Path:
    """Make a wheel of a checkout that carries the libraries. Returns the path of the wheel.

    A wheel made by `pip install .` is pure Python; only this function sets the variable that setup.py reads.
    """
    library = build(echo=echo)
    target = Path(output).resolve()
    target.mkdir(parents=True, exist_ok=True)
    before = set(target.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(target), "."]
    carried = {libraries.torch_name(): [library, libraries.hash_file(library)]}
    cuda_library, _ = libraries.search(cuda=True, carried=False)
    if cuda_library is not None and _env.use_cuda() is not False:
        beside = [cuda_library.with_suffix(".txt"), libraries.hash_file(cuda_library)]
        carried[libraries.cuda_name()] = [cuda_library, *beside]
    listed = {name: [str(path) for path in paths] for name, paths in carried.items()}
    environment = _env.with_variables(RADA_FAST_CARRY=json.dumps(listed))
    result = subprocess.run(
        command, cwd=libraries.PACKAGE.parent, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"the wheel was not made: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
    wheels = sorted(set(target.glob("*.whl")) - before) or sorted(target.glob("*.whl"), key=lambda p: p.stat().st_mtime)
    echo(f"wheel: {wheels[-1]}")
    return wheels[-1]
