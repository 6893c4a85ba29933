"""Draw problems, solve them and compare the solutions: the functions that several test files use."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.profiler import ProfilerActivity, profile

from rada_fast import _env
from rada_fast.config.method import AdapterConfig
from rada_fast.modules import RationalAdapter
from rada_fast.ops import rational_adapter

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""This folder holds larger vectors, real features and the PTX simulator; not every checkout has it beside it."""
VECTORS = ("small_d64", "medium_d128", "hot_d64", "clip_d512")
"""These files hold published outputs. Two are in tests/data/published, so that every clone compares with them."""


def around(r: random.Random, *edges: int) -> int:
    """Draw a small number, or one at or beside one of the edges: sizes that fill a tile, a block or a launch."""
    return r.choice([r.randint(1, 9), *(edge + r.choice([-1, 0, 0, 1]) for edge in edges)])


def problem(
    config: AdapterConfig,
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float = 0.3,
    seed: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw unit-norm features and parameters that are exact in dtype, so that every type solves the same problem."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * batch + classes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image, text = normalize(draw(batch, config.embed_dim), dim=-1), normalize(draw(classes, config.embed_dim), dim=-1)
    shapes = {name: tensor.shape for name, tensor in RationalAdapter(config).state_dict().items()}
    parameters = {name: scale / config.embed_dim**0.25 * draw(*shape) for name, shape in shapes.items()}
    return image.to(dtype), text.to(dtype), {name: tensor.to(dtype) for name, tensor in parameters.items()}


def problem_with_masks_of(
    offsets: list[float], config: AdapterConfig, batch: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A problem whose mask is exactly 1 + offsets, over and over, in every class: the output projection is only a bias.

    So an element of the mask may be exactly 0, where relu has its kink, or exactly 1, where the penalty l1 has its own,
    and the distances of many elements are equal.
    """
    image, text, parameters = problem(config, batch, classes, dtype)
    repeated = torch.tensor(offsets, dtype=dtype).repeat(config.embed_dim // len(offsets) + 1)[: config.embed_dim]
    parameters |= {"out_proj.weight": torch.zeros_like(parameters["out_proj.weight"]), "out_proj.bias": repeated}
    return image, text, parameters


def with_large_scores(
    config: AdapterConfig, inputs: tuple[Tensor, Tensor, dict[str, Tensor]], size: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A problem whose attention scores lie around -size in every other head and around +size in the others.

    The biases of queries and keys move the scores, and probabilities stay as spread as they are without them. Where
    there is one head, the text query has the positive scores.
    """
    image, text, parameters = inputs
    heads, head = config.num_heads, config.head_dim
    bias = (size * config.temperature / head**0.5) ** 0.5
    signs = torch.tensor([-1.0, 1.0]).repeat(heads)[:heads].repeat_interleave(head)
    moved = dict(parameters)
    for name, value in parameters.items():
        if name.endswith("k_proj.bias"):
            moved[name] = value + bias
        elif "q_proj" in name and name.endswith(".bias"):
            moved[name] = value + bias * (-signs if heads == 1 and name == "q_proj2.bias" else signs).to(value.dtype)
    return image, text, moved


def published_vectors(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Tensor], AdapterConfig]:
    """Return the inputs and outputs of the published code, its parameters in dtype, and its configuration.

    The arrays are image and text (before normalisation), label, logit_scale, temperature, num_heads, logits, mask,
    cross_entropy, linf and, for each parameter, grad.NAME of cross_entropy + 0.5 linf. The parameters require
    gradients. Where there is no such file, the calling test is skipped.
    """
    folders = [Path(__file__).parent / "data" / "published", SHARED / "data" / "official_vectors"]
    path = next((folder / f"{name}.npz" for folder in folders if (folder / f"{name}.npz").is_file()), None)
    if path is None:
        pytest.skip(f"no file of the published vectors {name} beside this checkout")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    parameters = {
        key.removeprefix("param."): arrays.pop(key).to(dtype).requires_grad_()
        for key in list(arrays)
        if key.startswith("param.")
    }
    temperature, heads = float(arrays["temperature"]), int(arrays["num_heads"])
    config = AdapterConfig.official(arrays["image"].shape[1], temperature=temperature, num_heads=heads)
    return arrays, parameters, config


def solve(
    config: AdapterConfig,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]],
    dtype: torch.dtype,
    backend: str,
    penalty: str | None = "l2",
    wanted: set[str] | None = None,
    logit_scale: float = 20.0,
) -> dict[str, Tensor]:
    """Return the outputs and gradients of one backend, in float64. wanted: inputs that require gradients, or None."""
    image, text, parameters = inputs
    leaves = {"image": image, "text": text, **parameters}
    leaves = {
        name: tensor.to(dtype).clone().requires_grad_(wanted is None or name in wanted)
        for name, tensor in leaves.items()
    }
    output = rational_adapter(
        leaves["image"], leaves["text"], logit_scale, {name: leaves[name] for name in parameters}, config,
        penalty=penalty, return_mask=True, backend=backend,
    )  # fmt: skip
    labels = torch.arange(len(image), device=image.device) % len(text)
    loss = cross_entropy(output.logits.float() if dtype != torch.float64 else output.logits, labels)
    results = {"logits": output.logits, "mask": output.mask}
    if output.penalty is not None:
        results["penalty"] = output.penalty
        loss = loss + 1.5 * output.penalty
    if any(leaf.requires_grad for leaf in leaves.values()):
        loss.backward()
    results |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach().double() for name, value in results.items() if value is not None}


def solve_in_several_orders(
    config: AdapterConfig,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]],
    dtype: torch.dtype,
    penalty: str | None = "l2",
    *,
    orders: int = 6,
) -> list[dict[str, Tensor]]:
    """Solve one problem with the reference several times, with the terms of its sums over columns in another order.

    Where scores are large, an error is a few roundings of scores, and in one order they may happen to cancel. The
    columns of the features and of each head are shuffled, and results are put back in order. The adapter has one layer.
    """
    image, text, parameters = inputs
    generator = torch.Generator().manual_seed(0)
    columns, inner = torch.arange(config.embed_dim), torch.arange(config.embed_dim)
    solutions = []
    for _ in range(orders):

        def shuffled(name: str, value: Tensor, *, columns: Tensor = columns, inner: Tensor = inner) -> Tensor:
            if name.endswith(".weight"):
                return value[columns][:, inner] if name.startswith("out_proj") else value[inner][:, columns]
            if name.endswith(".bias") and not name.startswith("out_proj"):
                return value[inner]
            return value[..., columns]

        moved = {name: shuffled(name, value) for name, value in parameters.items()}
        solution = solve(config, (image[:, columns], text[:, columns], moved), dtype, "reference", penalty)
        back = {"columns": columns.argsort(), "inner": inner.argsort()}
        solutions.append({
            name: value if name in ("logits", "penalty") else shuffled(name.removeprefix("d"), value, **back)
            for name, value in solution.items()
        })  # fmt: skip
        columns = torch.randperm(config.embed_dim, generator=generator)
        inner = torch.rand(config.num_heads, config.head_dim, generator=generator).argsort(1)
        inner = (inner + config.head_dim * torch.arange(config.num_heads)[:, None]).flatten()
    return solutions


def solve_weighted(
    config: AdapterConfig,
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]],
    dtype: torch.dtype,
    backend: str,
    *,
    in_loss: tuple[str, ...] = ("logits", "penalty", "mask"),
    penalty: str = "l2",
    episodes: int | None = None,
) -> dict[str, Tensor]:
    """Return one backend's results, and the gradients of the sum of those that in_loss names, in float64.

    The elements of the sum have drawn weights. Every input requires a gradient.
    """
    image, text, parameters = inputs
    leaves = {"image": image, "text": text, **parameters}
    leaves = {name: value.to(dtype).clone().requires_grad_() for name, value in leaves.items()}
    output = rational_adapter(
        leaves["image"], leaves["text"], 20.0, {name: leaves[name] for name in parameters}, config,
        penalty=penalty, return_mask=True, episodes=episodes, backend=backend,
    )  # fmt: skip
    found = {name: getattr(output, name) for name in ("logits", "penalty", "mask")}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(value.shape, generator=generator).to(dtype) for name, value in found.items()}
    torch.stack([(weights[name] * found[name]).sum() for name in in_loss]).sum().backward()
    found |= {f"d{name}": value.grad for name, value in leaves.items() if value.grad is not None}
    return {name: value.detach().double() for name, value in found.items()}


def assert_within_budget(
    exact: dict[str, Tensor],
    plain: dict[str, Tensor] | list[dict[str, Tensor]],
    fast: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    roundings: int = 2,
) -> None:
    """Compare a backend's errors with those that plain PyTorch makes in the same type.

    exact: solve of the reference in float64; plain: of the reference in dtype, or a list of several such solutions, of
    which the one with the largest error counts for each result; fast: of the backend in dtype. The error
    of an output may be twice that of the reference in dtype, the error of a gradient three times, plus some roundings
    of the largest value, because the reference may happen to be exact.
    """
    assert fast.keys() == exact.keys()
    solutions = [plain] if isinstance(plain, dict) else plain
    for name, value in exact.items():
        error, size = (fast[name] - value).norm(), value.norm()
        allowed = torch.stack([(solution[name] - value).norm() for solution in solutions]).max()
        factor = 3 if name.startswith("d") else 2
        if _env.sanitizers():
            # Loops with sanitizers are not vectorised: a sum is one chain of additions instead of sixteen.
            factor *= 4
        if name == "penalty":
            # The penalty is of (M - 1)^2. One rounding of M near 1 changes |M - 1|, which is about the penalty's root.
            size = size + size.sqrt()
        if name.startswith(("dq_proj", "dk_proj")) and "dv_proj.weight" in exact:
            # These are sums of P (dP - delta), differences of terms as large as those of the values' gradient.
            size = size + exact["dv_proj." + name.rpartition(".")[2]].norm()
        band = roundings * torch.finfo(dtype).eps * size + torch.finfo(dtype).tiny
        assert error <= factor * allowed + band, (
            f"{name}: error {error:.3e}, reference's {allowed:.3e}, band {band:.1e}"
        )


def assert_replays_from_a_graph(call: Callable[[], Tensor]) -> None:
    """Check on a CUDA device that a call can be captured in a graph, and that every replay gives the same answer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = call().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.zero_()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


class Allocated(NamedTuple):
    """Hold the bytes of CPU tensors that a call has left behind, and the most that it had at once."""

    left: int
    peak: int


def allocated_by(call: Callable[[], object]) -> Allocated:
    """Call, and count the bytes of all tensors on the CPU that are allocated and freed meanwhile, in any thread.

    Tensors that are freed meanwhile, and were allocated before, count only where another such call has seen that.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    present = list(accumulate(change for _, change in changes))
    return Allocated(present[-1], max(present)) if present else Allocated(0, 0)


def threads_ahead() -> list[threading.Thread]:
    """Return the threads that read items ahead and have not ended."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("rada_fast ahead")]


def wait_until_no_thread_is_ahead() -> None:
    """Wait until all threads that read ahead have ended, and fail after five seconds."""
    for _ in range(500):
        if not threads_ahead():
            return
        time.sleep(0.01)
    raise AssertionError(f"{threads_ahead()} still run")
