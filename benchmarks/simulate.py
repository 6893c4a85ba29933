"""A tool for developers: run one training step of the Triton kernels in a PTX simulator and print what it counts.

    make simulate
    python -m benchmarks.simulate --sizes 6x200 8x6x200 --json

Operations and bytes are shown as multiples of the least that a step needs, with a roofline's lower bound of the time on
an A100-40GB, and beside them the same for the literal baseline. These are counts and bounds, never measured times. The
tool needs no GPU, and minutes for large sizes.

The simulator is the Python package ``ptxsim``. It is not published and cannot be installed: the few developers who have
it put its parent folder on PYTHONPATH, or call that folder ``shared`` and place it beside the checkout.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import costs
from rada_fast import _env
from rada_fast.bench.costs import BACKWARD, least_operations
from rada_fast.config.arguments import shortened
from rada_fast.config.method import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter
from rada_fast.system.terminal import PlainConsole, print_json

DEVICE = "a100-40gb"
BESIDE = Path(__file__).resolve().parents[2] / "shared"
"""Where the simulator is looked for after PYTHONPATH."""
SIZES = ("6x200", "6x1000", "1x500", "64x100", "8x6x200")
MAX_ROWS = 2**20
"""The most images times classes of one size: more would take hours and gigabytes."""


def tensors(
    config: AdapterConfig, episodes: int, batch: int, classes: int, device: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    image = normalize(draw(episodes * batch, config.embed_dim), dim=-1)
    text = normalize(draw(classes, config.embed_dim), dim=-1)
    lead = (episodes,) if episodes > 1 else ()
    parameters = {key: 0.1 * draw(*lead, *value.shape) for key, value in RationalAdapter(config).state_dict().items()}
    stored = {key: value.to(device, torch.bfloat16).requires_grad_() for key, value in parameters.items()}
    return image.to(device, torch.bfloat16), text.to(device, torch.bfloat16), stored


def simulate(config: AdapterConfig, episodes: int, batch: int, classes: int) -> list[dict[str, Any]]:
    """One row for each launch of a forward and backward, one for each pass, one for the literal baseline."""
    import ptxsim

    image, text, parameters = tensors(config, episodes, batch, classes, "cpu")
    with ptxsim.simulated() as log:
        output = rational_adapter(
            image, text, 100.0, parameters, config, penalty="l2", episodes=episodes, backend="triton"
        )
        forward = len(log)
        assert output.penalty is not None
        (output.logits.float().sum() + output.penalty.sum()).backward()
    least = least_operations(episodes * batch, classes, config.embed_dim)
    least_moved = costs.kernel_bytes(config, episodes, batch, classes)
    size = {"episodes": episodes, "batch": batch, "classes": classes}

    def row(name: str, stats: list[Any], minimum: float) -> dict[str, Any]:
        whole = sum(stats[1:], stats[0])
        bounds = [ptxsim.estimate(part, DEVICE) for part in stats]
        seconds = [max(bound.terms.values()) for bound in bounds]
        unique = whole.footprint_ld + whole.footprint_st
        return {
            **size,
            "kernel": name,
            "launches": len(stats),
            "tensor_over_least": sum(whole.tensor_flops.values()) / minimum,
            "requested_bytes": whole.global_ld["bytes"] + whole.global_st["bytes"],
            "unique_bytes": unique,
            "unique_over_least": unique / sum(least_moved[part.kernel] for part in stats),
            "sector_efficiency_load": whole.efficiency("ld"),
            "sector_efficiency_store": whole.efficiency("st"),
            "shared_over_ideal": whole.shared_wavefronts / max(1, whole.shared_ideal),
            "bound_microseconds": 1e6 * sum(seconds),
            "bound_by": max(bounds[0].terms, key=bounds[0].terms.get) if len(stats) == 1 else "",
        }

    rows = [row(stats.kernel, [stats], least if at < forward else BACKWARD * least) for at, stats in enumerate(log)]
    rows += [row("forward", log[:forward], least), row("backward", log[forward:], BACKWARD * least)]
    machine = ptxsim.GPUS[DEVICE]
    image, text, parameters = tensors(config, 1, batch, classes, "meta")
    with costs.EagerCounter(machine.hbm_bytes, machine.tensor["bf16"]) as eager:
        output = rational_adapter(image, text, 100.0, parameters, config, penalty="l2", backend="literal")
        assert output.penalty is not None
        (output.logits.float().sum() + output.penalty).backward()
    rows.append(
        {
            **size,
            "kernel": "literal, both passes",
            "launches": episodes * eager.launches,
            "tensor_over_least": episodes * eager.operations / ((1 + BACKWARD) * least),
            "requested_bytes": episodes * eager.bytes,
            "unique_bytes": episodes * eager.bytes,
            "bound_microseconds": 1e6 * episodes * eager.seconds,
            "bound_by": "HBM or tensor cores",
        }
    )
    return rows


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    console = PlainConsole()
    # In fewer columns figures would be cut.
    console.width = max(console.width, 166)
    table = Table(title=title)
    for name in (
        "kernel",
        "launches",
        "ops/least",
        "requested MB",
        "unique MB",
        "unique/least",
        "ld eff.",
        "st eff.",
        "shared/ideal",
        "bound us",
        "by",
    ):
        table.add_column(name, justify="left" if name in ("kernel", "by") else "right", no_wrap=name == "kernel")
    for row in rows:
        table.add_row(
            row["kernel"], str(row["launches"]), f"{row['tensor_over_least']:.2f}",
            f"{row['requested_bytes'] / 1e6:.1f}", f"{row['unique_bytes'] / 1e6:.1f}",
            *(f"{row[key]:.2f}" if key in row else "" for key in (
                "unique_over_least", "sector_efficiency_load", "sector_efficiency_store", "shared_over_ideal")),
            f"{row['bound_microseconds']:.1f}", row["bound_by"],
        )  # fmt: skip
    console.print(table)


def parse_size(text: str) -> tuple[int, int, int]:
    """Episodes, images and classes from "BxK" or "ExBxK"."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}(x0*[1-9][0-9]{0,8}){1,2}", text):
        raise argparse.ArgumentTypeError(f"must be BxK or ExBxK, positive numbers, got {shortened(text)}")
    *episodes, batch, classes = (int(part) for part in text.split("x"))
    size = (episodes[0] if episodes else 1, batch, classes)
    if math.prod(size) > MAX_ROWS:
        raise argparse.ArgumentTypeError(f"must have a product of at most {MAX_ROWS}, got {shortened(text)}")
    return size


def add_problem(parser: argparse.ArgumentParser, sizes: Sequence[str], width: int, why: str = "") -> None:
    """Add the options for sizes and for the adapter, with their defaults. why: what to say after the default width."""
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, default=[parse_size(size) for size in sizes], metavar="[Ex]BxK",
        help=f"images x classes, or episodes x images x classes with own weights each; by default {' '.join(sizes)}",
    )  # fmt: skip
    parser.add_argument("--preset", choices=["official", "paper"], default="official", help="the adapter's arithmetic")
    parser.add_argument(
        "--embed-dim", type=int, default=width, metavar="D", help=f"the width, by default {width}{why}"
    )  # fmt: skip


def chosen_adapter(parser: argparse.ArgumentParser, options: argparse.Namespace) -> AdapterConfig:
    """Return the adapter that the options ask for. The parser ends the program with an error where there is none."""
    try:
        return (AdapterConfig.paper if options.preset == "paper" else AdapterConfig.official)(options.embed_dim)
    except UserError as error:
        parser.error(f"argument --embed-dim: {error}")


def find_simulator(program: str) -> bool:
    """Return whether the simulator can be imported. The program's error says where it was looked for."""
    if not _env.has_module("ptxsim"):
        sys.path.append(str(BESIDE))
    if _env.has_module("ptxsim"):
        return True
    print(
        f"{program}: the Python package ptxsim, the PTX simulator that executes the kernels, was not "
        f"found; it is not published, and is looked for on PYTHONPATH and in {BESIDE}",
        file=sys.stderr,
    )
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every size as soon as it is done. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_problem(parser, SIZES, 512)
    parser.add_argument("--json", action="store_true", help="print one JSON line for each kernel and pass")
    options = parser.parse_args(arguments)
    adapter = chosen_adapter(parser, options)
    if not find_simulator("benchmarks.simulate"):
        return 2
    for episodes, batch, classes in options.sizes:
        size = f"{episodes} x {batch} x {classes}" if episodes > 1 else f"{batch} x {classes}"
        PlainConsole(stderr=True).print(f"simulating {size} (minutes for large ones)", style="dim")
        rows = simulate(adapter, episodes, batch, classes)
        if options.json:
            for row in rows:
                print_json(row, indent=None)
        else:
            title = f"{options.preset} D {options.embed_dim}, {size}, bfloat16: counts and lower bounds, no timings"
            print_table(rows, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
