"""Measure the peak of memory of one row of Table 5 in a process of its own.

`python -m rada_fast.bench.table5_memory` reads a request from standard input and prints the figures, both as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import torch

from rada_fast.bench.timing import memory_of
from rada_fast.config.bench import BenchTable5Options, Table5Name
from rada_fast.config.measuring import MeasuringOptions
from rada_fast.config.options import ModelOptions
from rada_fast.models.vision_language import resolve_device
from rada_fast.system.memory import present_memory

Figures = dict[str, float | None]


def memory_in_own_process(name: Table5Name, frame: int, options: BenchTable5Options) -> Figures:
    """Return the memory of a row in MiB, as it is in a process that computes nothing else.

    name: the method; frame: the number of the frame among those of the options.

    Raises RuntimeError with what the process says if it fails.
    """
    request = json.dumps({"name": name, "frame": frame, "options": dataclasses.asdict(options)})
    command = [sys.executable, "-m", "rada_fast.bench.table5_memory"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {name} has failed: {done.stderr.strip()[-500:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def answer(request: str) -> Figures:
    """Return the figures for a request, in this process.

    peak_mib: the peak of the process during one frame, or of the device's tensors on a GPU.
    tensors_mib: the same without what Python and PyTorch take before a model is loaded, which are the model's weights
        and everything that is computed. It is what torch.cuda.max_memory_allocated counts.
    extra_mib: the same without the weights and whatever else lies there before the frame begins.
    """
    from rada_fast.bench.table5 import call_of, frames_of, table5_model

    asked = json.loads(request)
    given = asked["options"]
    options = BenchTable5Options(
        **{
            **given,
            "only": tuple(given["only"]),
            "settings": tuple(given["settings"]),
            "measuring": MeasuringOptions(**given["measuring"]),
            "model": ModelOptions(**given["model"]),
        }
    )
    device = resolve_device(options.model.device)
    before = present_memory().get("process_mib")
    vlm = table5_model(options, device)
    call = call_of(asked["name"], frames_of(options)[asked["frame"]], vlm)
    if device.type == "cuda":
        call()  # The first call also loads libraries and captures graphs.
    found = memory_of(call, device.type)
    if found is None:
        return {"peak_mib": None, "tensors_mib": None, "extra_mib": None}
    base = 0.0 if device.type == "cuda" else before
    tensors = None if base is None else found.peak_mib - base
    return {"peak_mib": found.peak_mib, "tensors_mib": tensors, "extra_mib": found.extra_mib}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(answer(sys.stdin.read())))
