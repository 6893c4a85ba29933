"""Read environment variables and the capabilities of processors and devices, which no other module does."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rada_fast.errors import UserError

# PyTorch is imported in the functions that ask it, so that the command line can check variables without loading it.

BACKEND_NAMES = ("auto", "literal", "reference", "cpu", "triton", "cuda")


def check_variables(*, building: bool) -> None:
    """Raise UserError where one of this package's variables has a value that means nothing.

    building: whether the variables of a build are checked too.
    """
    backend_variable()
    tiles_from_table()
    float32_products()
    bfloat16_products()
    triton_target()
    uses_graphs()
    keeps_freed_memory()
    show_traceback()
    if building:
        use_cuda()


def place_other_caches() -> None:
    """Give other libraries a folder for their caches where the user has no home folder or one that is not writable.

    Without it they would make a folder named "~" in the current one, warn, or stop.
    """
    try:
        home: Path | None = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        home = None
    if home is not None and is_writable(home):
        return
    try:
        folder = cache_dir()
    except UserError:  # no folder can be written to; whatever needs one reports that itself
        return
    if home is None:
        # With HOME set, cache_dir would answer differently; other programs of this user have no HOME.
        os.environ["RADA_FAST_CACHE"] = str(folder)
        os.environ["HOME"] = str(folder / "home")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))


def shorten_waits() -> None:
    """Let PyTorch's threads wait for each other in a loop only shortly and then asleep, unless the user decides.

    By default OpenMP's threads wait in a loop for about a millisecond. Where another program uses the cores too, they
    wait there for a thread that is not running, and keep it from running: small steps take up to 40 times as long.
    With this setting they take 1.2 times as long on a machine of their own. PyTorch must not have been imported.
    """
    chosen = any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if not chosen and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def quiet_profiler() -> None:
    """Let PyTorch's profiler print nothing of its own, such as that there is no GPU, unless the user decides.

    PyTorch must not have been imported.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def show_traceback() -> bool:
    """Return whether RADA_FAST_TRACEBACK=1 asks for the traceback of the error that ends a command."""
    return os.environ.get("RADA_FAST_TRACEBACK") not in (None, "", "0")


def backend_variable() -> str | None:
    """Return the value of RADA_FAST_BACKEND, or None where it is unset or empty."""
    value = os.environ.get("RADA_FAST_BACKEND") or None
    if value is not None and value not in BACKEND_NAMES:
        raise UserError(f"RADA_FAST_BACKEND must be one of {', '.join(BACKEND_NAMES)}, got {value!r}")
    return value


def cache_dir() -> Path:
    """Return the folder for files that can be made again: RADA_FAST_CACHE, or else the user's cache folder.

    A user without a home folder, or with one that cannot be written to (a container may run as any user), gets a folder
    of their own under the temporary one. Raises UserError where that is not possible either.
    """
    folder = _named_cache() or _user_cache()
    return folder if folder and (_named_cache() or is_writable(folder)) else _temporary_cache()


def cache_dirs() -> list[Path]:
    """Return every folder that ``cache_dir`` may have returned earlier: the files in them are still useful."""
    if named := _named_cache():
        return [named]
    user, temporary = _user_cache(), _temporary_name()
    return [folder for folder in (user, temporary if temporary and _is_own(temporary) else None) if folder]


def _named_cache() -> Path | None:
    if not (value := os.environ.get("RADA_FAST_CACHE")):
        return None
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise UserError(f"RADA_FAST_CACHE must name a folder, got {value!r}: there is no such user") from None


def _user_cache() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, and no entry in the system's list of users
        return None
    return folder / "rada_fast" if folder.is_absolute() else None


def _temporary_name() -> Path | None:
    try:
        return Path(tempfile.gettempdir()) / f"rada_fast-{os.getuid()}"
    except FileNotFoundError:
        return None


def _is_own(folder: Path) -> bool:
    """Return whether nobody else can put files into a folder. Compiled libraries are loaded from the cache."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _temporary_cache() -> Path:
    folder = _temporary_name()
    if folder is None:
        raise UserError("no folder for the cache can be written to; set RADA_FAST_CACHE to one")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_own(folder):
        raise UserError(
            f"the cache folder {folder} must be yours and not writable for others; set RADA_FAST_CACHE to another one"
        )
    return folder


def is_writable(folder: Path) -> bool:
    """Return whether files can be written into a folder, which may have to be made first."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def tiles_from_table() -> bool:
    """Return whether RADA_FAST_TILES=table makes the kernels use their own tables even where tiles were measured."""
    value = os.environ.get("RADA_FAST_TILES") or None
    if value not in (None, "table"):
        raise UserError(f"RADA_FAST_TILES must be table, got {value!r}")
    return value == "table"


class RankVariables(NamedTuple):
    """What torchrun tells a process about the group of processes that it has started.

    rank, size: the number of this process, counted from 0, and how many there are on all machines (RANK, WORLD_SIZE).
    local_rank, local_size: the same on this machine alone (LOCAL_RANK, LOCAL_WORLD_SIZE).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def rank_variables() -> RankVariables | None:
    """Return the variables of torchrun, or None in a program that was started alone.

    Raises UserError where some of the variables are missing or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        return None
    if os.environ["WORLD_SIZE"] == "1":
        return None  # a single process needs no group
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"several processes need the variables that torchrun sets, missing: {', '.join(missing)}")
    values = [os.environ[name] for name in names]
    if not all(value.isdecimal() for value in values):
        raise UserError(f"{', '.join(names)} must be numbers, got {', '.join(map(repr, values))}")
    found = RankVariables(*map(int, values))
    if not (found.rank < found.size and found.local_rank < found.local_size <= found.size):
        raise UserError(f"{', '.join(names)} contradict each other: {', '.join(values)}")
    return found


def has_agent_store() -> bool:
    """Return whether torchrun's own process holds the store of the ranks; otherwise the first rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rank_error_file() -> Path | None:
    """Return the file into which a process tells torchrun why it has failed, or None without torchrun."""
    value = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(value) if value else None


def threads_of_rank(local_count: int) -> int | None:
    """Return how many threads each of several processes on this machine shall use, or None where the user decides.

    The cores that this process may use are divided evenly. torchrun sets OMP_NUM_THREADS to 1 where it is not set, so
    that only another value is taken for the user's decision.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1" or os.environ.get("MKL_NUM_THREADS"):
        return None
    return max(1, len(usable_cores()) // local_count)


def float32_products() -> str | None:
    """Return RADA_FAST_FLOAT32, the way in which the Triton kernels multiply float32, or None where it is not set."""
    value = os.environ.get("RADA_FAST_FLOAT32") or None
    if value not in (None, "ieee", "tf32x3", "tf32"):
        raise UserError(f"RADA_FAST_FLOAT32 must be ieee, tf32x3 or tf32, got {value!r}")
    return value


def triton_target() -> str | None:
    """Return RADA_FAST_TARGET, the architecture whose code the Triton kernels run, or None for the device's own."""
    value = os.environ.get("RADA_FAST_TARGET") or None
    if value not in (None, "sm80"):
        raise UserError(f"RADA_FAST_TARGET must be sm80, got {value!r}")
    return value


def uses_graphs() -> bool:
    """Return whether episodes may be replayed from CUDA graphs, which RADA_FAST_GRAPHS=0 forbids."""
    value = os.environ.get("RADA_FAST_GRAPHS") or None
    if value not in (None, "0", "1"):
        raise UserError(f"RADA_FAST_GRAPHS must be 0 or 1, got {value!r}")
    return value != "0"


def keeps_freed_memory() -> bool:
    """Return whether the C library may be told to keep freed memory, see system/memory.py.

    RADA_FAST_KEEP_MEMORY=0 forbids it. So does a variable of glibc's own that says how it shall manage memory.
    """
    value = os.environ.get("RADA_FAST_KEEP_MEMORY") or None
    if value not in (None, "0", "1"):
        raise UserError(f"RADA_FAST_KEEP_MEMORY must be 0 or 1, got {value!r}")
    own = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    chosen = any(os.environ.get(name) for name in own) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return value == "1" or (value is None and not chosen)


def bfloat16_products() -> str | None:
    """Return RADA_FAST_BFLOAT16, the way in which the CPU operator multiplies bfloat16, or None where it is not set."""
    value = os.environ.get("RADA_FAST_BFLOAT16") or None
    if value not in (None, "native", "float32"):
        raise UserError(f"RADA_FAST_BFLOAT16 must be native or float32, got {value!r}")
    return value


def has_module(name: str) -> bool:
    """Return whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def has_cuda() -> bool:
    """Return whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def cuda_device_count() -> int:
    """Return how many CUDA devices PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def cuda_device_name(index: int | None = None) -> str:
    """Return the name of the CUDA device with this index, or of the current device."""
    import torch

    return torch.cuda.get_device_name(index)


def current_cuda_device() -> int:
    """Return the index of the CUDA device that a new tensor would be made on."""
    import torch

    return torch.cuda.current_device()


def is_capturing() -> bool:
    """Return whether launches on the current CUDA stream are captured into a graph instead of run."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def cuda_device_capability(index: int | None = None) -> tuple[int, int]:
    """Return the compute capability of the CUDA device with this index, or of the current one, (8, 0) for sm_80."""
    import torch

    return torch.cuda.get_device_capability(index)


def cuda_block_memory(index: int) -> int:
    """Return the bytes of shared memory that one block may have on the CUDA device with this index."""
    import torch

    # PyTorch's type hints lack this property.
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


def cuda_cache_bytes() -> int:
    """Return the size of the L2 cache of the current CUDA device, or 64 MiB where PyTorch does not tell it."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20


def cuda_version() -> str | None:
    """Return the CUDA version that PyTorch was built with, or None where it was built without CUDA."""
    import torch

    return torch.version.cuda


def device_capabilities() -> list[int]:
    """Return the different compute capabilities of the CUDA devices, smallest first, 80 for 8.0."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    return sorted({10 * major + minor for major, minor in found})


def cpu_capability() -> str:
    """Return the instruction set that PyTorch's own CPU kernels use, for instance AVX512."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def processor_name() -> str:
    """Return what the system calls the processor, or its architecture where it has no name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.machine()


def has_native_products(dtype: str) -> bool:
    """Return whether the processor has instructions that multiply this type, and PyTorch's libraries use them.

    On x86 these are oneDNN's products, which a PyTorch may have been built without. The answer is True for every dtype
    but "bfloat16" and "float16". A variable that restricts PyTorch (ATEN_CPU_CAPABILITY) or oneDNN (ONEDNN_MAX_CPU_ISA)
    to an older instruction set counts as an older processor.
    """
    if dtype not in ("bfloat16", "float16"):
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("bf16" if dtype == "bfloat16" else "asimdhp") in _processor_flags()
    allowed = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT").upper()
    least = {"bfloat16": ("BF16", "FP16", "AMX", "AVX10"), "float16": ("FP16", "AMX", "AVX10")}
    if allowed not in ("DEFAULT", "ALL") and not any(word in allowed for word in least[dtype]):
        return False
    names = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "float16": {"avx512_fp16", "amx_fp16"}}
    return has_onednn() and cpu_capability().startswith("AVX512") and bool(names[dtype] & _processor_flags())


def has_onednn() -> bool:
    """Return whether PyTorch has oneDNN's products for x86 processors."""
    import torch

    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


@cache
def _processor_flags() -> frozenset[str]:
    """Return the names that the system gives to the processor's instruction sets, none where it gives no list.

    Not every release of PyTorch has such a list, and its names change.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(words, "").split())


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_memory() -> int:
    """Return how many bytes of memory are available now, or of memory in all where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def debug_build() -> bool:
    """Return whether DEBUG=1 asks for a build of the extension with symbols and assertions."""
    return os.environ.get("DEBUG") == "1"


def use_cuda() -> bool | None:
    """Return whether USE_CUDA asks for the CUDA kernels in a build, or None where it is not set.

    False leaves the kernels out. True makes it an error where they cannot be built. None builds them where there is a
    device or TORCH_CUDA_ARCH_LIST asks for them.
    """
    match os.environ.get("USE_CUDA"):
        case None | "":
            return None
        case "0":
            return False
        case "1":
            return True
        case value:
            raise UserError(f"USE_CUDA must be 0 or 1, got {value!r}")


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit that CUDA_HOME names, or None."""
    value = os.environ.get("CUDA_HOME")
    return Path(value) if value else None


def cxx() -> str | None:
    """Return CXX, the C++ compiler that the user has chosen, or None."""
    return os.environ.get("CXX") or None


def with_variables(**values: str) -> dict[str, str]:
    """Return this process's environment with these variables added, for a program that is to be started."""
    return os.environ | values


def keep_fused_multiply_adds() -> None:
    """Let Triton fuse multiplications with additions, unless the user has set its variable.

    Where it is not set, Triton 3.9 warns and 3.10 does not fuse; the kernels were measured with fused operations.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pass_target_to_triton() -> None:
    """Let Triton compile every kernel of this process for RADA_FAST_TARGET, where that variable is set.

    Triton then makes the instructions of that architecture, and assembles them for the device it runs on.
    """
    if target := triton_target():
        os.environ["TRITON_OVERRIDE_ARCH"] = target


def cuda_arch_list() -> str | None:
    """Return TORCH_CUDA_ARCH_LIST, the compute capabilities to build for, or None where it is unset or empty."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or None


def sanitizers() -> str | None:
    """Return RADA_FAST_SANITIZE, the sanitizers for the CPU's operators ("address,undefined"), or None."""
    return os.environ.get("RADA_FAST_SANITIZE") or None
