"""Every benchmark report names the machine and the versions it was made with."""

from __future__ import annotations

from typing import Any

import torch

from rada_fast import _env
from rada_fast.loops.run_folder import versions


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["versions"] = versions()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = _env.cpu_capability()
    machine_info["cuda"] = torch.cuda.get_device_name() if _env.has_cuda() else None


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if _env.has_cuda() else f"{torch.get_num_threads()} CPU threads"
    return f"rada_fast {versions()['rada_fast']}, torch {torch.__version__}, {device}, {_env.cpu_capability()}"
