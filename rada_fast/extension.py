"""The compiled extension: one description of its sources and flags, its build with ninja, and how it is found.

Nothing here runs at import. ``build`` is the only function that compiles; ``load`` only looks and never raises.
"""

from __future__ import annotations

import hashlib
import json
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

from rada_fast import _env, cuda_toolkit
from rada_fast.cuda_toolkit import Toolkit
from rada_fast.errors import UserError

LIBRARY = "rada_fast_ops.so"
CUDA_LIBRARY = "rada_fast_cuda.so"
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
LOOP_FLAGS = {
    # Its arithmetic rounds where torch.optim's does: which products are fused is written out, not left to the compiler.
    "episodic_optimizer_loops": ["-ffp-contract=off"],
    # Pillow's results to the bit: a fused product and sum would round once where Pillow rounds twice.
    "augmix_loops": ["-ffp-contract=off"],
    "view_loops": ["-ffp-contract=off"],
}
"""Flags of single sources of vector loops (vector_math.cpp and *_loops.cpp)."""


@dataclass(frozen=True)
class BuildParameters:
    """Everything that decides what the library is.

    compiler: the C++ compiler's command.
    sources: (source, object name, flags of its own).
    flags: shared by all sources; link: the linker's arguments after the objects.
    cuda: what compiles the CUDA library, or the reason why there is none.
    cuda_sources, cuda_glue: of the kernels and of what calls them, (source, object name); cuda_link: as link.
    """

    compiler: str
    sources: tuple[tuple[Path, str, tuple[str, ...]], ...]
    flags: tuple[str, ...]
    link: tuple[str, ...]
    cuda: Toolkit | str
    cuda_sources: tuple[tuple[Path, str], ...]
    cuda_glue: tuple[tuple[Path, str], ...]
    cuda_link: tuple[str, ...]


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
        if source.stem == "vector_math" or source.stem.endswith("_loops"):
            # Kept apart from library headers, so that these flags cannot leak into code that runs everywhere.
            loops = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", *LOOP_FLAGS.get(source.stem, ()))
            for name in VECTOR_FLAGS if x86 else ("baseline",):
                own = (*loops, f"-DRADA_CAPABILITY={name}", *VECTOR_FLAGS[name])
                sources.append((source, f"{source.stem}_{name}.o", own))
        else:
            sources.append((source, f"{source.stem}.o", ("-O2", "-fopenmp")))
    root = Path(torch.__file__).resolve().parent
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    debug: tuple[str, ...] = ("-g",) if _env.debug_build() else ("-DNDEBUG",)
    sanitized: tuple[str, ...] = ()
    if sanitizers := _env.sanitizers():
        # vptr asks for type information that PyTorch's libraries keep to themselves.
        sanitized = (f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
        debug = ("-g", "-fno-omit-frame-pointer")
    toolkit = cuda_toolkit.find_toolkit()
    kernels, glue = (sorted((folder / "cuda").glob(pattern)) for pattern in ("*.cu", "*.cpp"))
    # The static runtime needs no other CUDA library in the process, and its names stay its own.
    runtime = f"-L{toolkit.runtime}" if isinstance(toolkit, Toolkit) else ""
    cuda_link = (runtime, "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread")
    return BuildParameters(
        compiler=os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
        or "c++",
        sources=tuple(sources),
        flags=("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", abi, *debug, *sanitized, *include),
        # Without -fopenmp here: the OpenMP runtime is the one PyTorch has loaded, never a second one.
        link=("-shared", *sanitized, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
        cuda=toolkit,
        cuda_sources=tuple((source, f"cuda_{source.stem}.o") for source in kernels),
        cuda_glue=tuple((source, f"cuda_{source.stem}.o") for source in glue),
        cuda_link=("-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", *cuda_link),
    )


def _torch_name() -> str:
    # The part after "+" names an index ("cpu", "cu130"), not another interface.
    return f"torch{torch.__version__.split('+')[0]}"


def _place_name() -> str:
    # Objects of a sanitized build lie apart: neither it nor the next plain one compiles the other's again.
    suffix = "-sanitized" if _env.sanitizers() else ""
    return f"{_torch_name()}-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}{suffix}"


@cache
def _sources_key(folder: Path, cuda: bool = False) -> str:
    """Of everything that a library may be made of: all folders but the other library's own."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in folder.rglob(pattern)):
        if path.relative_to(folder).parts[0] != ("cpu" if cuda else "cuda"):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _flags_key(cuda: bool = False) -> str:
    # The device code is not part of it: a library is found whatever TORCH_CUDA_ARCH_LIST says where it is loaded.
    common = (_env.debug_build(), _env.sanitizers(), platform.machine())
    own = (torch.version.cuda,) if cuda else (VECTOR_FLAGS, LOOP_FLAGS, torch.compiled_with_cxx11_abi())
    return hashlib.sha256(repr((*own, *common)).encode()).hexdigest()[:8]


def build_place() -> Path:
    """Folder that ``build`` compiles into: inside a checkout, else in the cache.

    It is named after PyTorch's version and Python's interface; the library in it after the sources and flags.
    """
    folder = source_dir()
    in_checkout = folder is not None and folder.parent != PACKAGE and (folder.parent / "pyproject.toml").is_file()
    root = PACKAGE.parent / "build" if in_checkout and os.access(PACKAGE.parent, os.W_OK) else _env.cache_dir()
    return root / "extension" / _place_name()


def _built_library(cuda: bool = False) -> Path | None:
    folder = source_dir()
    if folder is None:
        return None
    return build_place() / f"{_sources_key(folder, cuda)}-{_flags_key(cuda)}" / (CUDA_LIBRARY if cuda else LIBRARY)


def carried_library(cuda: bool = False) -> Path:
    """Where a wheel carries the library for the PyTorch that is installed; it may not exist.

    The CUDA library stands on the stable ABI: one serves all PyTorch releases of a CUDA major version.
    """
    if cuda:
        return PACKAGE / "lib" / _cuda_name() / CUDA_LIBRARY
    return PACKAGE / "lib" / _torch_name() / LIBRARY


def _cuda_name() -> str:
    return f"cuda{(torch.version.cuda or 'none').split('.')[0]}"


def find_library(cuda: bool = False) -> Path | None:
    """The library that ``load`` would take: one built from the sources at hand, else the wheel's own; or None."""
    for path in (_built_library(cuda), carried_library(cuda)):
        if path is not None and path.is_file():
            return path
    return None


def _said_of(library: Path) -> str:
    """What a build wrote beside a CUDA library: its device code and compiler."""
    note = library.with_suffix(".txt")
    return note.read_text(encoding="utf-8").strip() if note.is_file() else ""


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
    lines.append(f"build {escape(output)}: link {objects}")
    if isinstance(toolkit := parameters.cuda, Toolkit):
        version = f"-DTORCH_TARGET_VERSION=0x{cuda_toolkit.LEAST_TORCH[0]:02x}{cuda_toolkit.LEAST_TORCH[1]:02x}{0:012x}"
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


def _install(made: Path, library: Path) -> None:
    """A library in use must not change under its readers: write beside it, then rename."""
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}")
    shutil.copy2(made, fresh)
    fresh.replace(library)


def build(
    *, jobs: int | None = None, timeout: float = LOCK_TIMEOUT, echo: Callable[[str], None] = print, force: bool = False
) -> Path:
    """Compile the extension with ninja, once per PyTorch version, Python interface, sources and flags.

    The CUDA kernels go into a library of their own, where nvcc is found and PyTorch is built with CUDA. Where they
    cannot be made a line says why and the rest is built; USE_CUDA=1 makes that an error, USE_CUDA=0 leaves them out.

    jobs: compilers at once; None for as many as processors and memory allow.
    timeout: seconds to wait for another build of the same thing.
    echo: receives the messages, a line each.
    force: compile even where the library is there.

    Returns the CPU library's path. Raises UserError with the reason where it cannot be built.
    """
    if platform.system() != "Linux":
        raise UserError(f"the extension is built on Linux only, this is {platform.system()}; everything else works")
    parameters = build_parameters()
    library, cuda_library = _built_library(), _built_library(cuda=True)
    assert library is not None
    assert cuda_library is not None
    toolkit = parameters.cuda
    with_cuda = isinstance(toolkit, Toolkit)
    cuda_words = f"CUDA kernels for {toolkit}" if with_cuda else f"no CUDA kernels: {toolkit}"
    if _env.use_cuda() and not with_cuda:
        raise UserError(f"USE_CUDA=1 asks for CUDA kernels, which cannot be built: {toolkit}")
    cuda_ready = not with_cuda or (cuda_library.is_file() and _said_of(cuda_library) == str(toolkit))
    if library.is_file() and cuda_ready and not force:
        echo(f"extension: up to date for {_place_name()}, {cuda_words}: {library}")
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
    echo(f"extension: {cuda_words}")
    start = time.monotonic()
    with _lock(build_place() / "lock", timeout):
        (work / "build.ninja").write_text(_ninja_text(parameters, work / LIBRARY))
        command = [ninja, "-C", str(work), "-j", str(jobs), "-k", "0"]
        if force:
            subprocess.run([*command, "-t", "clean"], capture_output=True, check=False)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            echo(result.stdout[-4000:])
            # Broken CUDA kernels are no reason to go without the others: is it only them?
            alone = [*command, str(work / LIBRARY)]
            if subprocess.run(alone, capture_output=True, check=False).returncode or _env.use_cuda():
                raise UserError(f"the extension did not compile (ninja -C {work} shows why)")
            echo(f"extension: the CUDA kernels did not compile (ninja -C {work} shows why); the CPU kernels did")
        elif with_cuda:
            _install(work / CUDA_LIBRARY, cuda_library)
            cuda_library.with_suffix(".txt").write_text(f"{toolkit}\n", encoding="utf-8")
        _install(work / LIBRARY, library)
    echo(f"extension: built in {time.monotonic() - start:.0f} s: {library}")
    return library


_outcome: list[str | None] = []
_cuda_outcome: list[str | None] = []


def load() -> str | None:
    """Load the extension's operators, once. Returns None where they are usable, else the reason; never raises."""
    if not _outcome:
        _outcome.append(_load())
        _cuda_outcome.append(_load_cuda(_outcome[0]))
    return _outcome[0]


def load_cuda() -> str | None:
    """Whether the operators serve CUDA tensors: None, else the reason; never raises. A device need not be there."""
    load()
    return _cuda_outcome[0]


def cpu_paths() -> dict[str, str]:
    """How the loaded extension computes here: "vectors", "float32", "bfloat16"; an empty word is a type not served."""
    return dict(torch.ops.rada_fast.cpu_paths())


# What torch.compiler.assume_constant_result sets, without importing the compiler: torch.compile takes the answer of a
# call as it is instead of tracing files being looked for.
_functions: list[Any] = [load, load_cuda, cpu_paths]
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


def _load_cuda(reason: str | None) -> str | None:
    if reason is not None:
        return f"they need the rest of the extension: {reason}"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        library = find_library(cuda=True)
        if library is None:
            return "the CUDA kernels are not built; run `rada-fast build` where nvcc is found"
        torch.ops.load_library(str(library))
    except Exception as error:  # nor may it break the CPU's operators
        cause = error.__cause__ or error
        return f"the CUDA kernels do not load: {str(cause).splitlines()[0]}"
    return None


def _describe_cuda() -> dict[str, str]:
    reason = load_cuda()
    library = find_library(cuda=True)
    facts = {"CUDA kernels": reason or "usable", "CUDA library": str(library or "none")}
    if library is not None:
        facts["CUDA device code"] = _said_of(library) or "not said"
    if reason is None and _env.has_cuda():
        taken = int(torch.ops.rada_fast.device_architecture(torch.empty(0, device="cuda"))) // 10
        major, minor = torch.cuda.get_device_capability()
        facts["CUDA device takes"] = f"code for sm_{taken}, being sm_{major}{minor}"
    return facts


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
    return facts | _describe_cuda()


def build_wheel(output: Path | str = "dist", *, echo: Callable[[str], None] = print) -> Path:
    """Make a wheel that carries the library, from a checkout. Returns the wheel's path.

    `pip install .` stays pure Python; only this sets the variable that setup.py reads.
    """
    library = build(echo=echo)
    target = Path(output).resolve()
    target.mkdir(parents=True, exist_ok=True)
    before = set(target.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(target), "."]
    carried = {_torch_name(): [library]}
    cuda_library = _built_library(cuda=True)
    if cuda_library is not None and cuda_library.is_file() and _env.use_cuda() is not False:
        carried[_cuda_name()] = [cuda_library, cuda_library.with_suffix(".txt")]
    listed = {name: [str(path) for path in paths] for name, paths in carried.items()}
    environment = os.environ | {"RADA_FAST_CARRY": json.dumps(listed)}
    result = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"the wheel was not made: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
    made = sorted(set(target.glob("*.whl")) - before) or sorted(target.glob("*.whl"), key=lambda p: p.stat().st_mtime)
    echo(f"wheel: {made[-1]}")
    return made[-1]
