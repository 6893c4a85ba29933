"""The memory of the process: how much it has, how its lack shows, and how long what it has freed stays with it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from functools import cache
from pathlib import Path

from rada_fast import _env

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""The numbers of these settings in glibc's malloc.h."""
_LARGEST_INT = 2**31 - 1
_PAD = 16 * 2**20
"""The bytes by which the heap grows beyond what was asked for. They cost nothing before they are written to."""


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, for as long as the process lives.

    By default glibc returns every large block to the system at once. The next tensor of that size is then made of new
    pages, and the system fills each of them with zeros when it is first written to: an encoder's layers free and
    allocate gigabytes for every batch, and spend a sixth of their time in that. With this setting, blocks of every size
    come from the heap, which only grows.

    Its price is that the process keeps the most memory that it has needed at any time until it ends, and a few per cent
    more where freed blocks do not fit the next tensors. Processes that are forked later inherit the setting.

    Calling it again does nothing. It also does nothing where the C library is not glibc, where the user has set an
    allocator variable of glibc's, or where RADA_FAST_KEEP_MEMORY=0 forbids it. Returns whether the setting is in force.
    """
    if not _env.keeps_freed_memory():
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (no other C library has this function)
        setting = library.mallopt
    except (OSError, TypeError, AttributeError):
        return False
    setting.argtypes, setting.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    values = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, _PAD))
    answers = [setting(name, value) for name, value in values]
    return all(answers)


def present_memory() -> dict[str, float]:
    """Return the memory that this process has now, in MiB, and that of its tensors on a GPU if it uses one."""
    found: dict[str, float] = {}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["process_mib"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except (OSError, ValueError, IndexError):  # no system but Linux has this file
        pass
    if "torch" in sys.modules and _env.has_cuda():
        import torch

        if torch.cuda.is_initialized():
            found["cuda_mib"] = round(torch.cuda.memory_reserved() / 2**20, 1)
    return found


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the processor or of a GPU is exhausted."""
    if isinstance(error, MemoryError):
        return True
    # PyTorch's own class for it is a RuntimeError too, which neither the processor's allocator nor cuBLAS uses.
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def has_room(size: int) -> bool:
    """Return whether the system gives this process so many bytes more. They are given back at once, and not used."""
    try:
        mmap.mmap(-1, size).close()
    except (OSError, MemoryError):
        return False
    return True


def free_unused() -> None:
    """Give back what is not used any more, after memory has run out, so that a smaller piece of work finds room."""
    gc.collect()
    if "torch" in sys.modules and _env.has_cuda():
        import torch

        torch.cuda.empty_cache()
