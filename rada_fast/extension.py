"""The compiled extension: one description of its sources and flags, its build with ninja, and how it is found.

Nothing here runs at import. ``build`` is the only function that compiles; ``load`` only looks and never raises.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rada_fast import _env
from rada_fast.errors import UserError

LIBRARY = "rada_fast_ops.so"
PACKAGE = Path(__file__).resolve().parent
LOCK_TIMEOUT = 600.0
"""Seconds to wait for another build of the same thing: a full build takes about one minute on two cores."""
MEMORY_PER_JOB = 1.5 * 2**30
"""Bytes one compiler may take; the largest source, with all of ATen's headers, was seen at 1.1 GiB."""

VECTOR_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
"""Flags of each copy of the vector loops. Everything else is compiled for the oldest processor of the family."""

VECTOR_SOURCES: dict[str, tuple[str, ...]] = {
    "vector_math": (),
    # Pillow's results to the bit: a contracted product and sum would round once where Pillow rounds twice.
    "view_loops": ("-ffp-contract=off",),
}
"""Files compiled once per instruction set, with flags of their own."""


@dataclass(frozen=True)
class BuildParameters:
    """Everything that decides what the library is.

    compiler: the C++ compiler's command.
    sources: (source, object name, flags of its own).
    flags: shared by all sources; link: the linker's arguments after the objects.
    """

    compiler: str
    sources: tuple[tuple[Path, str, tuple[str, ...]], ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]


def source_dir() -> Path | None:
    """Folder of the C++ sources: inside an installed package, or beside the package in a checkout; None without."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    return None


def build_parameters() -> BuildParameters:
    """The one description of sources and flags; ``build`` and the wheel use it. Raises UserError without sources."""
    folder = source_dir()
    if folder is None:
        raise UserError("this installation has no C++ sources of the extension")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources: list[tuple[Path, str, tuple[str, ...]]] = []
    for source in sorted([*folder.glob("*.cpp"), *(folder / "cpu").glob("*.cpp")]):
        if source.stem in VECTOR_SOURCES:
            # Kept apart from library headers, so that these flags cannot leak into code that runs everywhere.
            loops = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", *VECTOR_SOURCES[source.stem])
            for name in VECTOR_FLAGS if x86 else ("baseline",):
                own = (*loops, f"-DRADA_CAPABILITY={name}", *VECTOR_FLAGS[name])
                sources.append((source, f"{source.stem}_{name}.o", own))
        else:
            sources.append((source, f"{source.stem}.o", ("-O2", "-fopenmp")))
    root = Path(torch.__file__).resolve().parent
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    debug = ("-g",) if _env.debug_build() else ("-DNDEBUG",)
    return BuildParameters(
        compiler=os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
        or "c++",
        sources=tuple(sources),
        flags=("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", abi, *debug, *include),
        # Without -fopenmp here: the OpenMP runtime is the one PyTorch has loaded, never a second one.
        link=("-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


def _torch_name() -> str:
    # The part after "+" names an index ("cpu", "cu130"), not another interface.
    return f"torch{torch.__version__.split('+')[0]}"


def _place_name() -> str:
    return f"{_torch_name()}-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"


@cache
def _sources_key(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.cpp"), *folder.rglob("*.h")]):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _flags_key() -> str:
    described = repr((VECTOR_FLAGS, _env.debug_build(), torch.compiled_with_cxx11_abi(), platform.machine()))
    return hashlib.sha256(described.encode()).hexdigest()[:8]


def build_place() -> Path:
    """Folder that ``build`` compiles into: inside a checkout, else in the cache.

    It is named after PyTorch's version and Python's interface; the library in it after the sources and flags.
    """
    folder = source_dir()
    in_checkout = folder is not None and folder.parent != PACKAGE and (folder.parent / "pyproject.toml").is_file()
    root = PACKAGE.parent / "build" if in_checkout and os.access(PACKAGE.parent, os.W_OK) else _env.cache_dir()
    return root / "extension" / _place_name()


def _built_library() -> Path | None:
    folder = source_dir()
    return None if folder is None else build_place() / f"{_sources_key(folder)}-{_flags_key()}" / LIBRARY


def carried_library() -> Path:
    """Where a wheel carries the library for the PyTorch that is installed; it may not exist."""
    return PACKAGE / "lib" / _torch_name() / LIBRARY


def find_library() -> Path | None:
    """The library that ``load`` would take: one built from the sources at hand, else the wheel's own; or None."""
    for path in (_built_library(), carried_library()):
        if path is not None and path.is_file():
            return path
    return None


@contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold an advisory lock. The system drops it with its process, so that a killed build blocks nobody."""
    import fcntl

    deadline = time.monotonic() + timeout
    with path.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another build holds {path} for more than {timeout:.0f} s; try again later"
                    ) from None
                time.sleep(0.2)
        yield


def default_jobs() -> int:
    """Compilers to run at once: one per processor, fewer where memory is short."""
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
    return "\n".join([*lines, f"build {escape(output)}: link {objects}", ""])


def build(
    *, jobs: int | None = None, timeout: float = LOCK_TIMEOUT, echo: Callable[[str], None] = print, force: bool = False
) -> Path:
    """Compile the extension with ninja, once per PyTorch version, Python interface, sources and flags.

    jobs: compilers at once; None for as many as processors and memory allow.
    timeout: seconds to wait for another build of the same thing.
    echo: receives the messages, a line each.
    force: compile even where the library is there.

    Returns the library's path. Raises UserError with the reason where it cannot be built.
    """
    if platform.system() != "Linux":
        raise UserError(f"the extension is built on Linux only, this is {platform.system()}; everything else works")
    parameters = build_parameters()
    library = _built_library()
    assert library is not None
    if library.is_file() and not force:
        echo(f"extension: up to date for {_place_name()}: {library}")
        return library
    # An environment that is used without being activated has its ninja beside its Python.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    compiler = shutil.which(shlex.split(parameters.compiler)[0])
    if compiler is None:
        raise UserError(f"the extension needs a C++ compiler and found none ({parameters.compiler}); the rest works")
    if ninja is None:
        raise UserError("the extension needs ninja to be built and found none (pip install ninja); the rest works")
    jobs = jobs or default_jobs()
    work = build_place() / "objects"
    work.mkdir(parents=True, exist_ok=True)
    copies = [name for _, name, _ in parameters.sources if name.startswith("vector_math_")]
    paths = ", ".join(name.removeprefix("vector_math_").removesuffix(".o") for name in copies)
    echo(f"extension: CPU kernels ({paths}) for {platform.machine()}, {_place_name()}, {compiler}, {jobs} jobs")
    start = time.monotonic()
    with _lock(build_place() / "lock", timeout):
        (work / "build.ninja").write_text(_ninja_text(parameters, work / LIBRARY))
        command = [ninja, "-C", str(work), "-j", str(jobs)]
        if force:
            subprocess.run([*command, "-t", "clean"], capture_output=True, check=False)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            echo(result.stdout[-4000:])
            raise UserError(f"the extension did not compile (ninja -C {work} shows why)")
        library.parent.mkdir(parents=True, exist_ok=True)
        # A library in use must not change under its readers: write beside it, then rename.
        fresh = library.with_suffix(f".{os.getpid()}")
        shutil.copy2(work / LIBRARY, fresh)
        fresh.replace(library)
    echo(f"extension: built in {time.monotonic() - start:.0f} s: {library}")
    return library


_outcome: list[str | None] = []


def load() -> str | None:
    """Load the extension's operators, once. Returns None where they are usable, else the reason; never raises."""
    if not _outcome:
        _outcome.append(_load())
    return _outcome[0]


def cpu_paths() -> dict[str, str]:
    """How the loaded extension computes here: "vectors", "float32", "bfloat16"; an empty word is a type not served."""
    return dict(torch.ops.rada_fast.cpu_paths())


# What torch.compiler.assume_constant_result sets, without importing the compiler: torch.compile takes the answer of a
# call as it is instead of tracing files being looked for.
_functions: list[Any] = [load, cpu_paths]
for _function in _functions:
    _function._dynamo_marked_constant = True


def _load() -> str | None:
    try:
        library = find_library()
        if library is None:
            carried = sorted(path.name for path in (PACKAGE / "lib").glob("torch*"))
            if carried:
                return f"this wheel carries the extension for {', '.join(carried)}, not for {_torch_name()}"
            return "the extension is not built for these sources and this PyTorch; run `rada-fast build`"
        torch.ops.load_library(str(library))
        from rada_fast.ops import _schemas

        _schemas.register()
    except Exception as error:  # a broken library must not break anything but itself
        cause = error.__cause__ or error
        return f"the extension does not load: {str(cause).splitlines()[0]}"
    return None


def describe() -> dict[str, str]:
    """What `doctor` says about the extension: whether it is usable, where it is, which instruction paths it takes."""
    reason = load()
    library = find_library()
    facts = {"state": reason or "usable", "library": str(library or "none"), "build place": str(build_place())}
    if reason is None:
        paths = cpu_paths()
        low = paths["bfloat16"]
        native = "processor's own bf16 dot products" if _env.has_bf16_dot_products() else "bf16 emulated in float32"
        facts |= {
            "vector loops": paths["vectors"],
            "float32 products": paths["float32"],
            "bfloat16 products": f"{low}, {native}" if low else "none: needs oneDNN and AVX-512",
        }
    return facts


def build_wheel(output: Path | str = "dist", *, echo: Callable[[str], None] = print) -> Path:
    """Make a wheel that carries the library, from a checkout. Returns the wheel's path.

    `pip install .` stays pure Python; only this sets the variable that setup.py reads.
    """
    library = build(echo=echo)
    target = Path(output).resolve()
    target.mkdir(parents=True, exist_ok=True)
    before = set(target.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(target), "."]
    environment = os.environ | {"RADA_FAST_CARRY": str(library), "RADA_FAST_CARRY_FOR": _torch_name()}
    result = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"the wheel was not made: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
    made = sorted(set(target.glob("*.whl")) - before) or sorted(target.glob("*.whl"), key=lambda p: p.stat().st_mtime)
    echo(f"wheel: {made[-1]}")
    return made[-1]
