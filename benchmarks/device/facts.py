"""Describe the device and its machine: ``python -m benchmarks.device.facts FILE`` writes JSON, and prints one line."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ASKED = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
    "memory.total", "mig.mode.current", "compute_mode",
)  # fmt: skip
PROPERTIES = (
    "name", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block",
    "shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "regs_per_multiprocessor",
    "max_threads_per_multi_processor", "clock_rate", "memory_clock_rate", "memory_bus_width",
)  # fmt: skip
PACKAGES = (
    "torch", "triton", "torchvision", "numpy", "open_clip_torch", "timm", "tyro", "rich", "matplotlib", "safetensors",
    "pytest", "pytest-benchmark", "hypothesis", "ninja",
)  # fmt: skip


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        known = {name: getattr(properties, name, None) for name in PROPERTIES}
        found.append({**known, "capability": "{}.{}".format(*torch.cuda.get_device_capability(index))})
    return found


def examine() -> dict[str, Any]:
    import torch

    from rada_fast.extension import cuda_toolkit

    nvcc = cuda_toolkit.find_nvcc()
    listed = output_of("nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return {
        "devices": devices(),
        "nvidia_smi": [dict(zip(ASKED, line.split(", "), strict=False)) for line in (listed or "").splitlines()],
        "nvcc": str(nvcc) if nvcc else None,
        "nvcc_version": (output_of(str(nvcc), "--version") or "").splitlines()[-2:] if nvcc else None,
        "toolkit": str(cuda_toolkit.find_toolkit()),
        "compiler": (output_of(compiler, "--version") or compiler).splitlines()[0] if compiler else None,
        "ninja": shutil.which("ninja"),
        "torch_cuda": torch.version.cuda,
        "torch_architectures": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": output_of("git", "rev-parse", "HEAD"),
    }


def line_of(facts: dict[str, Any]) -> str:
    """The facts that matter for all later steps, in one line."""
    parts = ["no device"]
    if facts["devices"]:
        one = facts["devices"][0]
        shared = (one["shared_memory_per_block_optin"] or 0) // 1024
        parts = [
            f"{one['name']}, sm_{one['capability'].replace('.', '')}, {one['multi_processor_count']} SMs",
            f"{shared} KiB of shared memory for a block",
        ]
        if facts["nvidia_smi"]:
            parts.append(f"driver {facts['nvidia_smi'][0]['driver_version']}")
    parts.append(f"nvcc {'found' if facts['nvcc'] else 'missing'}, C++ {'found' if facts['compiler'] else 'missing'}")
    missing = [name for name, found in facts["packages"].items() if found is None and name != "ninja"]
    parts += [f"not installed: {', '.join(missing)}"] if missing else []
    return ", ".join(parts)


def main() -> None:
    facts = examine()
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"device: {line_of(facts)}")


if __name__ == "__main__":
    main()
