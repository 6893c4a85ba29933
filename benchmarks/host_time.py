"""A tool for developers: how long the host works on a training step of the Triton kernels, on a machine without a GPU.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --preset paper --json

A stub takes the place of the CUDA driver. Kernels are compiled as usual, and everything runs that Python does for a
step, up to the call of Triton's compiled launcher, which returns at once. So the times are those of this machine's CPU
for checks, dispatch, autograd, allocations and the preparation of the launches. The time that CUDA takes to queue a
kernel is not among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import table, timing
from benchmarks.simulate import add_problem, chosen_adapter, tensors
from rada_fast.bench.compiled import recorded
from rada_fast.config.method import AdapterConfig
from rada_fast.ops import rational_adapter
from rada_fast.system.terminal import print_json

SIZES = ("1x50",)
CAPABILITY = 80


class StubLauncher:
    """Takes the place of Triton's compiled launcher, and launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class StubDriver:
    """Takes the place of Triton's driver, with one device of compute capability 8.0 that runs nothing."""

    launcher_cls = StubLauncher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 2**20},
        load_binary=lambda *arguments: (object(), 0, 32, 0, 1024),
        unload_module=lambda module: None,
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


@contextmanager
def stub_driver() -> Iterator[None]:
    """Open a block in which launches on CPU tensors go through Triton's own code, and no kernel is executed."""
    from triton.runtime import driver

    from rada_fast.ops._backends import triton as backend

    before, executes_on_cpu = driver._active, backend.executes_on_cpu
    driver.set_active(StubDriver())
    backend.executes_on_cpu = lambda: True
    try:
        yield
    finally:
        driver._active = before
        backend.executes_on_cpu = executes_on_cpu


def case_of(config: AdapterConfig, name: str, episodes: int, batch: int, classes: int, dtype: str) -> timing.Case:
    """Return the case that times a step, its forward pass, and its launches through Triton's own call."""
    image, text, parameters = tensors(config, episodes, batch, classes, "cpu")
    image, text = image.to(getattr(torch, dtype)), text.to(getattr(torch, dtype))
    parameters = {key: value.detach().to(image.dtype).requires_grad_() for key, value in parameters.items()}
    leaves, scale = list(parameters.values()), torch.tensor(100.0)
    ones, one = image.new_ones(episodes * batch, classes), image.new_ones(episodes)
    own = episodes if episodes > 1 else None

    def forward() -> Any:
        return rational_adapter(
            image, text, scale, parameters, config, penalty="l2", episodes=own, backend="triton"
        )  # fmt: skip

    def step() -> Any:
        output = forward()
        assert output.penalty is not None
        return torch.autograd.grad((output.logits, output.penalty), leaves, (ones, one if own else one[0]))

    @torch.no_grad()
    def prediction() -> Any:
        return forward()

    with recorded() as launches:
        step()

    def launched() -> None:
        for launch in launches:
            launch.kernel[(1,)](**launch.kwargs)

    return timing.Case(
        name=f"host, {name}",
        device="cpu",
        providers={
            "forward and backward": timing.Provider(step, None, dtype),
            "forward without gradients": timing.Provider(prediction, None, dtype),
            f"{len(launches)} launches by Triton's own call": timing.Provider(launched, None, dtype),
        },
        baseline="",
        least_bytes=0,
        sizes={"episodes": episodes, "batch": batch, "classes": classes, "launches": len(launches)},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size and print one table, or one JSON line for each row. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_problem(
        parser,
        SIZES,
        64,
        ": memory is then so small that the allocator of the CPU keeps it, as that of CUDA always does",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="by default bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each row")
    options = parser.parse_args(arguments)
    adapter = chosen_adapter(parser, options)
    rows = []
    with stub_driver():
        for episodes, batch, classes in options.sizes:
            size = f"{episodes}x{batch}x{classes}" if episodes > 1 else f"{batch}x{classes}"
            name = f"{options.preset} D {options.embed_dim}, {size}, {options.dtype}"
            found = timing.measure(case_of(adapter, name, episodes, batch, classes, options.dtype))
            rows += found
            if options.json:
                for row in found:
                    print_json(row, indent=None)
    if not options.json:
        print("\n".join(table.figures(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
