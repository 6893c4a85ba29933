"""The compiled extension: the description of its sources and flags, the places of its libraries, and their loading.

Nothing here runs at import. ``load`` only looks for libraries and never raises; ``build`` compiles them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rada_fast import _env
from rada_fast.errors import UserError
from rada_fast.extension import cuda_toolkit
from rada_fast.extension.cuda_toolkit import Toolkit

LIBRARY = "rada_fast_ops.so"
CUDA_LIBRARY = "rada_fast_cuda.so"
PACKAGE = Path(__file__).resolve().parents[1]

VECTOR_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
"""The flags of each copy of the vector loops. All other sources are compiled for the oldest processor of the family."""
LOOP_FLAGS = {
    # The arithmetic rounds where torch.optim rounds, so the source says which products are fused, not the compiler.
    "episodic_optimizer_loops": ["-ffp-contract=off"],
    # The results equal Pillow's to the bit. A fused product and sum would round once where Pillow rounds twice.
    "augmix_loops": ["-ffp-contract=off"],
    "view_loops": ["-ffp-contract=off"],
}
"""Further flags of some sources of vector loops (*_loops.cpp)."""


@dataclass(frozen=True)
class BuildParameters:
    """Everything that the content of the libraries depends on.

    compiler: the command of the C++ compiler.
    sources: each source with the name of its object and the flags of its own.
    flags: the flags that all sources share.
    link: the arguments of the linker after the objects.
    cuda: the toolkit that compiles the CUDA library, or the reason why this library is not built.
    cuda_sources: each source of the kernels with the name of its object.
    cuda_glue: each source of the functions that call the kernels, with the name of its object.
    cuda_link: the arguments of the linker for the CUDA library.
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
    """Return the folder of the C++ sources, in an installed package or beside it in a checkout, or None without one."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    return None


def build_parameters() -> BuildParameters:
    """Describe the sources and flags of the libraries. Raises UserError if there are no sources."""
    folder = source_dir()
    if folder is None:
        raise UserError("this installation has no C++ sources of the extension")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources: list[tuple[Path, str, tuple[str, ...]]] = []
    for source in sorted([*folder.glob("*.cpp"), *(folder / "cpu").glob("*.cpp")]):
        if source.stem.endswith("_loops"):
            # These sources include no library headers, so that their flags cannot reach code that runs everywhere.
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
        # The check vptr needs type information that PyTorch's libraries do not export.
        sanitized = (f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
        debug = ("-g", "-fno-omit-frame-pointer")
    toolkit = cuda_toolkit.asked_toolkit()
    kernels, glue = (sorted((folder / "cuda").glob(pattern)) for pattern in ("*.cu", "*.cpp"))
    # The static runtime needs no other CUDA library in the process, and does not export its names.
    runtime = f"-L{toolkit.runtime}" if isinstance(toolkit, Toolkit) else ""
    cuda_link = (runtime, "-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread")
    return BuildParameters(
        compiler=_env.cxx() or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "c++",
        sources=tuple(sources),
        flags=("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", abi, *debug, *sanitized, *include),
        # There is no -fopenmp here, so that the OpenMP runtime of PyTorch serves and no second one is loaded.
        link=("-shared", *sanitized, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
        cuda=toolkit,
        cuda_sources=tuple((source, f"cuda_{source.stem}.o") for source in kernels),
        cuda_glue=tuple((source, f"cuda_{source.stem}.o") for source in glue),
        cuda_link=("-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", *cuda_link),
    )


def torch_name() -> str:
    # The part after "+" names an index ("cpu", "cu130"), not another interface.
    return f"torch{torch.__version__.split('+')[0]}"


def build_name() -> str:
    # A sanitized build has a folder of its own, so that it and a plain build keep their objects.
    suffix = "-sanitized" if _env.sanitizers() else ""
    return f"{torch_name()}-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}{suffix}"


@cache
def _sources_key(folder: Path, cuda: bool = False) -> str:
    """Return a hash of all sources that a library may depend on: those of the other library alone are left out."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in folder.rglob(pattern)):
        if path.relative_to(folder).parts[0] != ("cpu" if cuda else "cuda"):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _flags_key(cuda: bool = False) -> str:
    # The device code is not part of the key, so a library is found whatever TORCH_CUDA_ARCH_LIST is when it is loaded.
    common = (_env.debug_build(), _env.sanitizers(), platform.machine())
    own = (_env.cuda_version(),) if cuda else (VECTOR_FLAGS, LOOP_FLAGS, torch.compiled_with_cxx11_abi())
    return hashlib.sha256(repr((*own, *common)).encode()).hexdigest()[:8]


def library_folders() -> list[Path]:
    """Return the folders in which built libraries are looked for: that in a checkout, then those in the caches.

    Their names contain PyTorch's version and Python's interface. In them, each set of sources and flags has a folder.
    """
    folder = source_dir()
    in_checkout = folder is not None and folder.parent != PACKAGE and (folder.parent / "pyproject.toml").is_file()
    roots = [PACKAGE.parent / "build"] if in_checkout else []
    return [root / "extension" / build_name() for root in (*roots, *_env.cache_dirs())]


def build_folder() -> Path:
    """Return the folder that a build writes to, the first of ``library_folders`` that can be written to."""
    for place in library_folders():
        if _env.is_writable(place):
            return place
    return _env.cache_dir() / "extension" / build_name()


def library_in(place: Path, cuda: bool = False) -> Path:
    """Return the path of the library that a build of the present sources makes. Raises UserError without sources."""
    folder = source_dir()
    if folder is None:
        raise UserError("this installation has no C++ sources of the extension")
    return place / f"{_sources_key(folder, cuda)}-{_flags_key(cuda)}" / (CUDA_LIBRARY if cuda else LIBRARY)


def carried_library(cuda: bool = False) -> Path:
    """Return the path at which a wheel carries the library for the installed PyTorch; the file may not exist.

    The CUDA library uses the stable ABI, so one serves all PyTorch releases of a CUDA major version.
    """
    if cuda:
        return PACKAGE / "lib" / cuda_name() / CUDA_LIBRARY
    return PACKAGE / "lib" / torch_name() / LIBRARY


def cuda_name() -> str:
    return f"cuda{(_env.cuda_version() or 'none').split('.')[0]}"


def hash_file(library: Path) -> Path:
    """Return the path of the file with the library's SHA-256, as `sha256sum` writes and checks it."""
    return library.with_name(f"{library.name}.sha256")


def fault_of(library: Path) -> str | None:
    """Return why a library must not be loaded, or None if it is the file that a build made.

    Loading a library whose end is missing kills the process, so its SHA-256 is compared first.
    """
    try:
        if not library.is_file() and not library.is_dir() and library.exists():
            return f"{library} is neither a file nor a folder"  # reading a pipe might never end
        with library.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except IsADirectoryError:
        return f"{library} is a folder"
    except OSError as error:
        return f"{library} cannot be read ({error.strerror})"
    try:
        recorded = hash_file(library).read_bytes().split()
    except OSError as error:
        return f"the recorded SHA-256 of {library} cannot be read ({error.strerror})"
    if [found.encode()] != recorded[:1]:
        return f"{library} is damaged: its SHA-256 is not the recorded one"
    return None


def search(cuda: bool = False, *, carried: bool = True) -> tuple[Path | None, list[str]]:
    """Find the library to load. Returns its path or None, and the faults of the libraries that were passed over.

    A library that was built from the present sources comes first, in the order of ``library_folders``. If carried is
    True, the library that a wheel carries comes last.
    """
    candidates = [] if source_dir() is None else [library_in(place, cuda) for place in library_folders()]
    if carried:
        candidates.append(carried_library(cuda))
    faults: list[str] = []
    for path in candidates:
        if not os.path.lexists(path):
            continue
        if (fault := fault_of(path)) is None:
            return path, faults
        faults.append(fault)
    return None, faults


def find_library(cuda: bool = False) -> Path | None:
    """Return the library that ``load`` would load, or None."""
    return search(cuda)[0]


def build_note(library: Path) -> str:
    """Return the note that a build wrote beside a CUDA library: its device code and compiler."""
    try:
        return library.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


_outcome: list[str | None] = []
_cuda_outcome: list[str | None] = []


def load() -> str | None:
    """Load the libraries of the extension once. Returns None, or the reason why it did not load; never raises.

    The ops load through ops/_backends/library.py, which also registers shapes and gradients.
    """
    if not _outcome:
        _outcome.append(_load())
        _cuda_outcome.append(_load_cuda(_outcome[0]))
    return _outcome[0]


def damage() -> str | None:
    """Return why an existing library is not used, or None if one is used or none was ever built."""
    reason = load()
    if reason is None:
        return None
    library, faults = search()
    return reason if library is not None or faults else None


def load_cuda() -> str | None:
    """Return None if the operators accept CUDA tensors, or the reason why not; never raises and needs no device."""
    load()
    return _cuda_outcome[0]


def cpu_paths() -> dict[str, str]:
    """Return how the loaded extension computes "vectors", "float32" and "bfloat16"; empty where it has no products."""
    return dict(torch.ops.rada_fast.cpu_paths())


def bfloat16_products() -> str:
    """Return how the loaded extension multiplies bfloat16: "native", or "float32" if it widens the tiles first.

    RADA_FAST_BFLOAT16 decides. Raises UserError if it asks for native products and there are none.
    """
    asked, possible = _env.bfloat16_products(), bool(cpu_paths()["bfloat16"])
    if asked == "native" and not possible:
        raise UserError("RADA_FAST_BFLOAT16=native: this processor or build of PyTorch has no products of bfloat16")
    # oneDNN accepts bfloat16 on every AVX-512 processor, and emulates the instructions if they are missing.
    return asked or ("native" if possible and _env.has_native_products("bfloat16") else "float32")


# torch.compile takes the results of these functions as constants instead of tracing a search for files. This is what
# torch.compiler.assume_constant_result sets; calling it would import the compiler.
_functions: list[Any] = [load, load_cuda, cpu_paths, bfloat16_products]
for _function in _functions:
    _function._dynamo_marked_constant = True


def _load() -> str | None:
    try:
        library, faults = search()
        if library is None and faults:
            return f"{faults[0]}; run `rada-fast build`"
        if library is None:
            carried = sorted(path.name for path in (PACKAGE / "lib").glob("torch*"))
            if carried:
                return f"this wheel carries the extension for {', '.join(carried)}, not for {torch_name()}"
            return "the extension is not built for these sources and this PyTorch; run `rada-fast build`"
        torch.ops.load_library(str(library))
    except Exception as error:  # a broken library must not stop anything else
        cause = error.__cause__ or error
        return f"the extension does not load: {str(cause).splitlines()[0]}"
    return None


def _load_cuda(reason: str | None) -> str | None:
    if reason is not None:
        return f"the CUDA kernels need the rest of the extension: {reason}"
    if refusal := cuda_toolkit.torch_refusal():
        return refusal
    try:
        library, faults = search(cuda=True)
        if library is None and faults:
            return f"{faults[0]}; run `rada-fast build`"
        if library is None:
            return "the CUDA kernels are not built; run `rada-fast build` where nvcc and a device are found"
        torch.ops.load_library(str(library))
    except Exception as error:  # nor may it stop the operators of the CPU
        cause = error.__cause__ or error
        return f"the CUDA kernels do not load: {str(cause).splitlines()[0]}"
    return None


def _describe_cuda() -> dict[str, str]:
    reason = load_cuda()
    library = find_library(cuda=True)
    facts = {"CUDA kernels": reason or "usable", "CUDA library": str(library or "none")}
    if library is not None:
        facts["CUDA device code"] = build_note(library) or "not said"
    if reason is None and _env.has_cuda():
        taken = int(torch.ops.rada_fast.device_architecture(torch.empty(0, device="cuda"))) // 10
        major, minor = _env.cuda_device_capability()
        facts["CUDA device takes"] = f"code for sm_{taken}, being sm_{major}{minor}"
    return facts


def describe() -> dict[str, str]:
    """Describe the extension for `doctor`: whether it is usable, where it is, which instructions it uses."""
    reason = load()
    library, faults = search()
    facts = {"state": reason or "usable", "library": str(library or "none"), "build place": str(build_folder())}
    if library is not None and faults:
        facts["not taken"] = "; ".join(faults)
    if reason is None:
        paths = cpu_paths()
        own = "the processor's own" if _env.has_native_products("bfloat16") else "emulated, as RADA_FAST_BFLOAT16 asks"
        low = f"{paths['bfloat16']}, {own}" if bfloat16_products() == "native" else "as float32, tiles widened"
        facts |= {
            "vector loops": paths["vectors"],
            "float32 products": paths["float32"],
            "bfloat16 products": low,
        }
    return facts | _describe_cuda()
