"""The only reader of environment variables and device capabilities."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from rada_fast.errors import UserError

# PyTorch is imported where it is asked, so that the command line reads its variables before, and without, it.

BACKEND_NAMES = ("auto", "literal", "reference", "cpu", "triton", "cuda")


def check_variables(*, building: bool) -> None:
    """Raise UserError where a variable of ours has a value that means nothing; a build has more of them."""
    backend_variable()
    tiles_from_table()
    float32_products()
    show_traceback()
    if building:
        use_cuda()


def show_traceback() -> bool:
    """Whether RADA_FAST_TRACEBACK=1 asks for the place in the source of whatever ends a command."""
    return os.environ.get("RADA_FAST_TRACEBACK") not in (None, "", "0")


def backend_variable() -> str | None:
    """Value of RADA_FAST_BACKEND, or None where it is unset or empty."""
    value = os.environ.get("RADA_FAST_BACKEND") or None
    if value is not None and value not in BACKEND_NAMES:
        raise UserError(f"RADA_FAST_BACKEND must be one of {', '.join(BACKEND_NAMES)}, got {value!r}")
    return value


def cache_dir() -> Path:
    """Folder for what can be made again: RADA_FAST_CACHE, else the user's cache folder."""
    if value := os.environ.get("RADA_FAST_CACHE"):
        return Path(value).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rada_fast"


def tiles_from_table() -> bool:
    """Whether RADA_FAST_TILES=table keeps the kernels to their own tables, whatever was measured."""
    value = os.environ.get("RADA_FAST_TILES") or None
    if value not in (None, "table"):
        raise UserError(f"RADA_FAST_TILES must be table, got {value!r}")
    return value == "table"


def float32_products() -> str | None:
    """RADA_FAST_FLOAT32: how the Triton kernels multiply float32, or None where it is unset or empty."""
    value = os.environ.get("RADA_FAST_FLOAT32") or None
    if value not in (None, "ieee", "tf32x3", "tf32"):
        raise UserError(f"RADA_FAST_FLOAT32 must be ieee, tf32x3 or tf32, got {value!r}")
    return value


def has_module(name: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def cpu_capability() -> str:
    """The instruction set PyTorch's own CPU kernels use, for instance AVX512."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def has_bf16_dot_products() -> bool:
    """Whether the processor multiplies bfloat16 pairs itself (AVX512_BF16 or AMX)."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def available_memory() -> int:
    """Bytes of memory that could be taken now; the whole memory where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def debug_build() -> bool:
    """Whether DEBUG=1 asks for a build of the extension with symbols and assertions."""
    return os.environ.get("DEBUG") == "1"


def use_cuda() -> bool | None:
    """USE_CUDA: False leaves the CUDA kernels out of a build, True makes their absence an error, None takes what is."""
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
    """The CUDA toolkit that CUDA_HOME names, or None."""
    value = os.environ.get("CUDA_HOME")
    return Path(value) if value else None


def cuda_arch_list() -> str | None:
    """TORCH_CUDA_ARCH_LIST, the compute capabilities to build for, or None where it is unset or empty."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or None


def sanitizers() -> str | None:
    """RADA_FAST_SANITIZE, the sanitizers to compile the CPU's operators with ("address,undefined"), or None."""
    return os.environ.get("RADA_FAST_SANITIZE") or None
