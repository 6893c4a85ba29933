"""Measure which tiles are fastest on this device (`rada-fast kernels --tune`); ops/_backends/tiles.py stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from rada_fast import _env
from rada_fast.bench.compiled import RecordedLaunch, recorded
from rada_fast.config.method import ROLES, AdapterConfig
from rada_fast.config.tools import KernelsOptions
from rada_fast.errors import UserError
from rada_fast.kernels._shared_memory import Target, assumed_target, target_of
from rada_fast.kernels.class_attention import class_attention_backward, class_attention_forward
from rada_fast.kernels.masked_logits import masked_logits_backward, masked_logits_forward
from rada_fast.kernels.parameter_gradients import parameter_gradients
from rada_fast.kernels.rational_projections import rational_projections_forward
from rada_fast.modules import RationalAdapter
from rada_fast.ops._backends.tiles import Sizes, cache_file, table_tile, tune
from rada_fast.ops._backends.triton import float32_precision
from rada_fast.system.terminal import PlainConsole, print_json


def launches_of(
    adapter: AdapterConfig, batch: int, classes: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Callable[[Any], Any]]:
    """Return the launches of one training step by name, as functions of a tile; None stands for the table's tile."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    image, text = 0.05 * draw(batch, adapter.embed_dim), 0.05 * draw(classes, adapter.embed_dim)
    state = RationalAdapter(adapter).state_dict()
    by_role = {
        role: {
            part: 0.05 * draw(*state[f"{name}.{part}"].shape)
            for part in ("weight", "bias")
            if f"{name}.{part}" in state
        }
        for role, name in ROLES.items()
    }
    weights = {role: parts["weight"] for role, parts in by_role.items() if "weight" in parts}
    biases = {role: parts["bias"] for role, parts in by_role.items() if "bias" in parts}
    output, bias = weights["output"], biases.get("output")
    inner = {role: value for role, value in weights.items() if role != "output"}
    inner_biases = {role: value for role, value in biases.items() if role != "output"}
    scale = torch.tensor(100.0, device=device)
    heads, factor = adapter.num_heads, adapter.input_scale_factor if adapter.input_scale == "logit" else 0.0
    precision = float32_precision()
    attention = {
        "precision": precision,
        "num_heads": heads,
        "temperature": adapter.temperature,
        "matrix": adapter.softmax == "matrix",
    }
    last = {"precision": precision, "relu": adapter.mask_activation == "relu", "penalty": "l2"}
    ones, one = draw(batch, classes), draw(1)

    def project(tile: Any) -> Any:
        return rational_projections_forward(
            image, text, scale, inner, inner_biases, scale_factor=factor, precision=precision, tile=tile
        )

    projections = project(None)

    def attend(tile: Any) -> Any:
        return class_attention_forward(projections, images=batch, **attention, tile=tile)

    attended = attend(None)

    def forward(tile: Any) -> Any:
        return masked_logits_forward(image, text, scale, attended.combined, output, bias, keep=True, **last, tile=tile)

    distances = forward(None).distances

    def mask_backward(tile: Any) -> Any:
        return masked_logits_backward(
            image, text, scale, attended, output, distances, ones, one, None, None, num_heads=heads, **last, tile=tile
        )

    mask_gradients = mask_backward(None)

    def attend_backward(tile: Any) -> Any:
        dattended, deltas = mask_gradients.dattended, mask_gradients.deltas
        return class_attention_backward(projections, attended, dattended, deltas, **attention, tile=tile)

    projection_gradients = attend_backward(None)

    def parameters(tile: Any) -> Any:
        return parameter_gradients(
            image,
            text,
            scale,
            attended.combined,
            projection_gradients,
            mask_gradients.doffset,
            weights,
            bias=bool(biases),
            scale_factor=factor,
            precision=precision,
            tile=tile,
        )

    return {
        "rational_projections_forward": project,
        "class_attention_forward": attend,
        "masked_logits_forward": forward,
        "masked_logits_backward": mask_backward,
        "class_attention_backward": attend_backward,
        "parameter_gradients": parameters,
    }


def launches_with_tile(
    adapter: AdapterConfig,
    batch: int,
    classes: int,
    dtype: torch.dtype,
    launch: str,
    tile: dict[str, int],
    *,
    target: int,
) -> list[RecordedLaunch]:
    """Return what one of a step's launches, named as in launches_of, launches with a tile. Nothing is executed.

    target: the compute capability for which the other launches choose their tiles.
    """
    sizes = Sizes(dtype, classes, batch * classes, adapter.embed_dim, adapter.head_dim, float32_precision())
    chosen = replace(table_tile(launch, sizes, Target.of_capability(target)), **tile)
    with assumed_target(Target.of_capability(target)), recorded() as launches:
        run = launches_of(adapter, batch, classes, dtype, "cpu")[launch]
        launches.clear()
        run(chosen)
    return launches


def run_tuning(config: KernelsOptions, adapter: AdapterConfig, dtype: torch.dtype) -> int:
    """Measure tiles, store the fastest and print them. Returns 0. Raises UserError without a CUDA device."""
    if not _env.has_cuda():
        raise UserError("--tune measures on a CUDA device and none is visible")
    from triton.testing import do_bench

    device = _env.cuda_device_name()
    sizes = Sizes(
        dtype, config.classes, config.batch * config.classes, adapter.embed_dim, adapter.head_dim, float32_precision()
    )
    launches = launches_of(adapter, config.batch, config.classes, dtype, "cuda")
    console = PlainConsole(stderr=True)
    report = tune(
        launches, sizes, device, lambda run: float(do_bench(run, warmup=10, rep=50, return_mode="median")),
        echo=lambda line: console.print(line, style="dim"), target=target_of(torch.device("cuda")),
    )  # fmt: skip
    if config.json:
        for launch, found in report.items():
            print_json({"launch": launch, "device": device, **found}, indent=None)
        return 0
    table = Table(title=f"{device}: tiles, kept in {cache_file(device)}")
    for name in ("launch", "table", "fastest", "table's time / its time"):
        table.add_column(name)
    for launch, found in report.items():
        tiles = (" ".join(map(str, found[key].values())) for key in ("table", "fastest"))
        table.add_row(launch, *tiles, f"{found['ratio']:.2f}")
    PlainConsole().print(table)
    return 0
