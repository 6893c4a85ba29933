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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rada_fast import _env
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
MOST_ROWS = 2**20
"""The most images times classes of one size: more would take hours and gigabytes."""


def least_operations(batch: int, classes: int, width: int) -> int:
    """F_min = B (8 K D^2 + 6 K^2 D): the forward's products, a multiply-add being two operations."""
    return batch * (8 * classes * width**2 + 6 * classes**2 * width)


def least_bytes(config: AdapterConfig, episodes: int, batch: int, classes: int) -> dict[str, int]:
    """By kernel, the bytes of what it must read and write once, in bfloat16 with all query kinds and the l2 penalty.

    Weights are those of each episode. Statistics are float32: a log-sum, a factor and a delta for each row, head and
    wide query kind, a logit's sum for each row. Scratch counts for nothing, a sum over columns for one value, and the
    gradient of a text query that images share for one copy of it.
    """
    width, heads, images = config.embed_dim, config.num_heads, episodes * batch
    rows, matrix = images * classes, config.softmax == "matrix"
    wide, text, image = 2 * rows * width, 2 * classes * width, 2 * images * width  # (B, K, D), T and f
    q_text, q_image = episodes * text, 2 * image  # the image query and its attention are float32
    weight = episodes * 2 * width * (width + config.bias)
    statistics, each = 4 * 2 * heads * rows, 4 * rows
    factors = statistics if matrix else 0
    attended = 2 * wide + q_image + factors
    queries = q_text + wide + q_image
    inward = queries + 3 * wide + statistics  # queries, keys, values, dO, deltas
    return {
        "rational_projections_fwd": image + text + 5 * weight + queries + 2 * wide,
        "class_attention_fwd": queries + 2 * wide + 2 * wide + q_image + statistics,
        "softmax_factors": 2 * statistics,
        "masked_logits_fwd": image + text + attended + weight + each,
        "masked_logits_reduce": 2 * each + 2 * rows,
        "masked_logits_bwd_offset": image + text + attended + weight + 2 * rows + wide,
        "masked_logits_bwd_attended": wide + 2 * wide + factors + weight + wide + statistics,
        "row_deltas": 2 * statistics,
        "class_attention_bwd_queries": inward + (0 if matrix else statistics) + q_image + queries,
        "class_attention_bwd_keys": inward + (0 if matrix else statistics) + 2 * wide,
        "parameter_gradients_kernel": image + text + attended + 4 * wide + q_text + q_image + 6 * weight,
    }


class EagerCounter(TorchDispatchMode):
    """What eager execution launches: operations of products, bytes that every kernel reads and writes."""

    def __init__(self, bytes_per_second: float, operations_per_second: float) -> None:
        super().__init__()
        self.launches, self.operations, self.bytes, self.seconds = 0, 0, 0, 0.0
        self._bandwidth, self._peak = bytes_per_second, operations_per_second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func.is_view
            or func.namespace == "prim"
            or func._schema.name in ("aten::detach", "aten::empty.memory_format")
        ):
            return out
        outputs = [value for value in (out if isinstance(out, tuple | list) else (out,)) if isinstance(value, Tensor)]
        inputs = [value for value in args if isinstance(value, Tensor)]
        if not outputs:
            return out
        # An expanded tensor is read once: its storage counts, not its shape.
        moved = sum(min(value.nbytes, value.untyped_storage().nbytes()) for value in (*inputs, *outputs))
        count = flop_registry.get(func._overloadpacket)
        operations = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.launches += 1
        self.operations += operations
        self.bytes += moved
        self.seconds += max(moved / self._bandwidth, operations / self._peak)
        return out


def _tensors(
    config: AdapterConfig, episodes: int, batch: int, classes: int, device: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    image = normalize(draw(episodes * batch, config.embed_dim), dim=-1)
    text = normalize(draw(classes, config.embed_dim), dim=-1)
    lead = (episodes,) if episodes > 1 else ()
    parameters = {key: 0.1 * draw(*lead, *value.shape) for key, value in RationalAdapter(config).state_dict().items()}
    made = {key: value.to(device, torch.bfloat16).requires_grad_() for key, value in parameters.items()}
    return image.to(device, torch.bfloat16), text.to(device, torch.bfloat16), made


def simulate(config: AdapterConfig, episodes: int, batch: int, classes: int) -> list[dict[str, Any]]:
    """One row for each launch of a forward and backward, one for each pass, one for the literal baseline."""
    import ptxsim

    image, text, parameters = _tensors(config, episodes, batch, classes, "cpu")
    with ptxsim.simulated() as log:
        output = rational_adapter(
            image, text, 100.0, parameters, config, penalty="l2", episodes=episodes, backend="triton"
        )
        forward = len(log)
        assert output.penalty is not None
        (output.logits.float().sum() + output.penalty.sum()).backward()
    least = least_operations(episodes * batch, classes, config.embed_dim)
    must = least_bytes(config, episodes, batch, classes)
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
            "unique_over_least": unique / sum(must[part.kernel] for part in stats),
            "sector_efficiency_load": whole.efficiency("ld"),
            "sector_efficiency_store": whole.efficiency("st"),
            "shared_over_ideal": whole.shared_wavefronts / max(1, whole.shared_ideal),
            "bound_microseconds": 1e6 * sum(seconds),
            "bound_by": max(bounds[0].terms, key=bounds[0].terms.get) if len(stats) == 1 else "",
        }

    rows = [row(stats.kernel, [stats], least if at < forward else 2.5 * least) for at, stats in enumerate(log)]
    rows += [row("forward", log[:forward], least), row("backward", log[forward:], 2.5 * least)]
    machine = ptxsim.GPUS[DEVICE]
    image, text, parameters = _tensors(config, 1, batch, classes, "meta")
    with EagerCounter(machine.hbm_bytes, machine.tensor["bf16"]) as eager:
        output = rational_adapter(image, text, 100.0, parameters, config, penalty="l2", backend="literal")
        assert output.penalty is not None
        (output.logits.float().sum() + output.penalty).backward()
    rows.append(
        {
            **size,
            "kernel": "literal, both passes",
            "launches": episodes * eager.launches,
            "tensor_over_least": episodes * eager.operations / (3.5 * least),
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
    if math.prod(size) > MOST_ROWS:
        raise argparse.ArgumentTypeError(f"must have a product of at most {MOST_ROWS}, got {shortened(text)}")
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every size as soon as it is done. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, default=[parse_size(size) for size in SIZES], metavar="[Ex]BxK",
        help=f"images x classes, or episodes x images x classes with own weights each; by default {' '.join(SIZES)}",
    )  # fmt: skip
    parser.add_argument("--preset", choices=["official", "paper"], default="official", help="the adapter's arithmetic")
    parser.add_argument("--embed-dim", type=int, default=512, metavar="D", help="the width, by default 512")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each kernel and pass")
    options = parser.parse_args(arguments)
    try:
        preset = AdapterConfig.paper if options.preset == "paper" else AdapterConfig.official
        adapter = preset(options.embed_dim)
    except UserError as error:
        parser.error(f"argument --embed-dim: {error}")
    if not _env.has_module("ptxsim"):
        sys.path.append(str(BESIDE))
    if not _env.has_module("ptxsim"):
        print(
            "benchmarks.simulate: the Python package ptxsim, the PTX simulator that executes the kernels, was not "
            f"found; it is not published, and is looked for on PYTHONPATH and in {BESIDE}",
            file=sys.stderr,
        )
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
