"""The versions and the memory of the process, for the summaries of runs and of measurements."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from rada_fast import _env
from rada_fast._version import __version__


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute the results."""
    found = {"rada_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "open_clip_torch", "triton", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def code_version() -> str:
    """Return the part of the version that may change numbers: all but the last number, which counts corrections."""
    return __version__.rpartition(".")[0]


def made_by() -> dict[str, str]:
    """Return what may change the last digits of numbers: versions, the processor and its instructions, and the GPU."""
    found = {**versions(), "processor": f"{_env.processor_name()}, {_env.cpu_capability()}"}
    return found | ({"gpu": _env.cuda_device_name()} if _env.has_cuda() else {})


def reset_peak_memory() -> None:
    """Reset the peak of the GPU memory. The peak of the process's own memory cannot be reset."""
    if _env.has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """Return the peak memory so far in MiB: that of the process, and that of the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if _env.has_cuda():
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak
