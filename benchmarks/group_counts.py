"""A tool for developers: count what the adaptation of a group of episodes launches on a GPU, on a machine without one.

    python -m benchmarks.group_counts
    python -m benchmarks.group_counts --sizes 1x200 --simulate

A group is what `adapt_episodes` computes at once: the selection of 6 of 64 views, three steps, and the prediction. Its
launches are those of the product on CPU tensors. A size is episodes x classes. For each Triton launch the tool shows
the programs, the operations of their products and the bytes that they load, read from the compiled code for an A100.
With --simulate, the PTX simulator of benchmarks.simulate executes each different launch once and counts distinct bytes;
this gives a lower bound of each launch's time, and takes minutes. The losses and the optimiser's steps are CUDA C++
kernels: their tensors are counted as they are read and written.

The sum of the bounds is compared with the time that an A100 needs at its peak for the encoder's products: 64 views in
ViT-B/16, 17.58e9 multiply-adds each. All figures are counts and bounds, never measured times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import simulate
from benchmarks.launched_programs import programs_of
from rada_fast.bench.compiled import TYPES, compiled_code, recorded
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine import groups
from rada_fast.engine.groups import EpisodeGroup, EpisodeRule
from rada_fast.modules import RationalAdapter
from rada_fast.ops import episodic_optimizer, prediction_loss_and_gradient, use_backend
from rada_fast.system.terminal import PlainConsole, print_json

SIZES = ("1x200", "8x200", "32x200", "1x1000")
VIEWS = 64
BANDWIDTH, PEAK = 1555e9, 312e12
"""The bytes and the bfloat16 operations of an A100-40GB in a second, by its data sheet."""
ENCODER_SECONDS = VIEWS * 2 * 17.58e9 / PEAK


def group_of(episodes: int, classes: int, dtype: torch.dtype) -> tuple[EpisodeGroup, tuple[Tensor, ...]]:
    """Return a group of the paper's episodes in width 512, and its arguments."""
    torch.manual_seed(0)
    adapter = RationalAdapter(AdapterConfig.official(512))
    initial = {name: value.detach() for name, value in adapter.named_parameters()}
    rule = EpisodeRule(adapter.config, EpisodeConfig(), dtype, True, tuple(initial))
    views, text = (
        normalize(torch.randn(*shape), dim=-1).to(dtype) for shape in ((episodes, VIEWS, 512), (classes, 512))
    )
    return EpisodeGroup(initial, rule, episodes), (views, text, torch.full((), 100.0))


def row(name: str, **counts: float) -> dict[str, Any]:
    return {"kernel": name, "programs": None, "operations": 0.0, "loaded_bytes": None, "distinct_bytes": None} | counts


def read_and_written(given: Sequence[Sequence[Tensor | None]]) -> int:
    return sum(value.nbytes for values in given for value in values if value is not None)


@contextmanager
def calls_of_cuda_kernels(rows: list[dict[str, Any]]) -> Iterator[None]:
    """Append a row for each call in the block that launches a CUDA C++ kernel on a GPU."""
    step = episodic_optimizer.episodic_optimizer_step

    def noted_loss(logits: Tensor, *given: Any) -> Any:
        moved = 2 * logits.nbytes
        rows.append(row("prediction_loss", distinct_bytes=moved, bound_us=1e6 * moved / BANDWIDTH))
        return prediction_loss_and_gradient(logits, *given)

    def noted_step(**given: Any) -> None:
        moved = read_and_written([given[key] for key in ("gradients", "sources", "copies")])
        written = (
            p.nbytes
            for p, copy in zip(given["parameters"], given["copies"], strict=True)
            if not (given["last"] and copy is not None)
        )
        moved += sum(written)
        moments = read_and_written([given["first_moments"], given["second_moments"]])
        unread = sum(
            value.nbytes
            for key in ("first_moments", "second_moments")
            for value, fresh in zip(given[key], given["fresh"], strict=True)
            if fresh
        )
        # A parameter is read where no source takes its place.
        own = (p.nbytes for p, source in zip(given["parameters"], given["sources"], strict=True) if source is None)
        moved += sum(own) + moments - unread + (0 if given["last"] else moments)
        rows.append(row("episodic_optimizer", distinct_bytes=moved, bound_us=1e6 * moved / BANDWIDTH))
        step(**given)

    with (
        patch.object(groups, "prediction_loss_and_gradient", noted_loss),
        patch.object(episodic_optimizer, "episodic_optimizer_step", noted_step),
    ):
        yield


def conversion(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the row of the launch by which PyTorch rounds the initial parameters, if they are rounded."""
    if dtype == torch.float32:
        return []
    # All of them are in float32, and are written in half the bytes.
    moved = (4 + 2) * sum(value.numel() for value in RationalAdapter(AdapterConfig.official(512)).parameters())
    return [row("initial_values", distinct_bytes=moved, bound_us=1e6 * moved / BANDWIDTH)]


def counted(episodes: int, classes: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each launch of a group, with what its compiled code does."""
    group, arguments = group_of(episodes, classes, dtype)
    rows = conversion(dtype)
    with use_backend("triton"), calls_of_cuda_kernels(rows), recorded() as launches:
        group(*arguments)
    code: dict[Any, str] = {}
    for launch in launches:
        # Launches with equal constants have the same code.
        key = (
            launch.kernel.__name__,
            *(str(value) for value in launch.kwargs.values() if not isinstance(value, Tensor)),
        )
        if key not in code:
            code[key] = compiled_code(launch, 80).asm["ttgir"]
        counts = programs_of(launch, code[key]).counts
        operations = sum(float(counts[name].sum()) for name in counts if name.endswith("_operations"))
        rows.append(
            row(
                launch.kernel.__name__.removesuffix("_kernel"), programs=len(counts["loads"]), operations=operations,
                loaded_bytes=float(counts["loaded_bytes"].sum()),
            )
        )  # fmt: skip
    return rows


@contextmanager
def each_once(log: list[Any]) -> Iterator[list[Any]]:
    """Simulate equal launches once, and return the list of the counts of all launches.

    What a launch counts does not depend on the values that it reads. log: the simulator's list of its launches.
    """
    jit = triton.runtime.jit.JITFunction
    simulated_run, done, found = jit.run, {}, []

    def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        shapes = {
            name: (value.shape, value.dtype) if isinstance(value, Tensor) else value for name, value in kwargs.items()
        }
        key = (self.__name__, tuple(grid), *shapes.items())
        if key not in done:
            simulated_run(self, *args, grid=grid, **kwargs)
            done[key] = log[-1]
        found.append(done[key])

    with patch.object(jit, "run", run):
        yield found


def simulated(episodes: int, classes: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each launch of a group, with what it does in the simulator."""
    import ptxsim

    group, arguments = group_of(episodes, classes, dtype)
    rows = conversion(dtype)
    with use_backend("triton"), calls_of_cuda_kernels(rows), ptxsim.simulated() as log, each_once(log) as found:
        group(*arguments)
    for stats in found:
        bound = ptxsim.estimate(stats, simulate.DEVICE)
        rows.append(
            row(
                stats.kernel.removesuffix("_kernel"), operations=float(sum(stats.tensor_flops.values())),
                distinct_bytes=stats.footprint_ld + stats.footprint_st,
                loaded_bytes=stats.global_ld["bytes"], bound_us=1e6 * max(bound.terms.values()),
            )
        )  # fmt: skip
    return rows


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each kernel, with the sums over its launches and their fewest and most programs."""
    names = list(dict.fromkeys(found["kernel"] for found in rows))
    sums = []
    for name in [*names, "group"]:
        own = [found for found in rows if name in (found["kernel"], "group")]
        programs = [found["programs"] for found in own if found["programs"]]
        sums.append(
            {"kernel": name, "launches": len(own), "least_programs": min(programs, default=None)}
            | {"most_programs": max(programs, default=None)}
            | {
                key: sum(found[key] for found in own if found.get(key) is not None)
                for key in ("operations", "loaded_bytes", "distinct_bytes", "bound_us")
            }
        )
    return sums


def print_table(rows: list[dict[str, Any]], title: str, episodes: int) -> None:
    table = Table(title=title)
    for name in ("kernel", "launches", "programs", "GFLOP", "loaded MB", "distinct MB", "bound us"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for found in rows:
        least, most = found["least_programs"], found["most_programs"]
        programs = (
            "" if least is None or found["kernel"] == "group" else f"{least}" if least == most else f"{least}-{most}"
        )
        table.add_row(
            found["kernel"], str(found["launches"]), programs, f"{found['operations'] / 1e9:.2f}",
            f"{found['loaded_bytes'] / 1e6:.1f}", f"{found['distinct_bytes'] / 1e6:.1f}", f"{found['bound_us']:.1f}",
        )  # fmt: skip
    console = PlainConsole()
    console.width = max(console.width, 120)
    console.print(table)
    share = rows[-1]["bound_us"] / (1e6 * episodes * ENCODER_SECONDS)
    console.print(f"bound over the encoder's time: {100 * share:.2f} %")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every size as soon as it is done. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.group_counts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", nargs="+", type=simulate.parse_size, default=[simulate.parse_size(size) for size in SIZES],
        metavar="ExK", help=f"episodes x classes; by default {' '.join(SIZES)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=list(TYPES), default="bfloat16", help="the type of the adapter's products")
    parser.add_argument("--simulate", action="store_true", help="execute the launches in the simulator")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each kernel")
    options = parser.parse_args(arguments)
    if options.simulate and not simulate.find_simulator("benchmarks.group_counts"):
        return 2
    for _, episodes, classes in options.sizes:
        rows = summed((simulated if options.simulate else counted)(episodes, classes, TYPES[options.dtype]))
        if options.json:
            for found in rows:
                print_json({"episodes": episodes, "classes": classes, "dtype": options.dtype} | found, indent=None)
        else:
            print_table(rows, f"{episodes} episodes, {classes} classes, {options.dtype}", episodes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
