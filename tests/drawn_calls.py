"""Calls of the adapter that are drawn at random: configurations, sizes, strides, and what has or wants a gradient."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast.config.method import MASK_PENALTIES, QUERY_KINDS, AdapterConfig
from rada_fast.ops import rational_adapter
from tests.support import assert_within_budget, problem

RESULTS = ("logits", "penalty", "mask")


class Call(NamedTuple):
    """Hold one drawn call.

    inputs: image, text, scale and the parameters, exact in dtype, in float64. strides: how each of them lies in memory.
    earlier: what all parameters but the output's are multiplied by in an earlier call whose projections are taken, or
    None. in_loss: the results that have gradients, of any strides. wanted: the inputs whose gradients are asked for.
    """

    config: AdapterConfig
    inputs: dict[str, Tensor]
    strides: dict[str, str]
    dtype: torch.dtype
    penalty: Any
    episodes: int | None
    output_is_zero: bool
    earlier: float | None
    in_loss: dict[str, str]
    wanted: list[str]


def as_laid_out(value: Tensor, kind: str) -> Tensor:
    """Return the same numbers in memory of another layout. What lies between them in memory is NaN."""
    if kind == "common":
        return value[:1].clone().expand_as(value)
    if kind == "transposed" and value.ndim > 1:
        return value.mT.contiguous().mT
    if value.ndim == 0:
        return value.clone()
    if kind == "apart":
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 3), torch.nan)
        wide[..., 1:-2:2] = value
        return wide[..., 1:-2:2]
    if kind == "inside":
        wide = value.new_full((*value.shape[:-1], value.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = value
        return wide[..., 1:-2]
    return value.clone()


def draw(
    seed: int, dtypes: list[torch.dtype], widths: list[tuple[int, int]], most_classes: int, *, layers: int = 1
) -> Call:
    """Draw a call. widths: pairs of a width and a number of heads. With several layers it has no episodes."""
    r = random.Random(seed)
    width, heads = r.choice(widths)
    config = AdapterConfig(
        width,
        num_heads=heads,
        softmax=r.choice(["matrix", "row"]),
        temperature=r.choice([1.0, 0.5, 2.0]),
        input_scale=r.choice(["logit", "none"]),
        input_scale_factor=r.choice([1.0, 4.0]),
        mask_activation=r.choice(["relu", "none"]),
        bias=r.random() < 0.7,
        queries=tuple(r.sample(QUERY_KINDS, r.choice([1, 2, 3, 3]))),
        num_layers=layers,
    )
    dtype, episodes = r.choice(dtypes), r.choice([None, 1, 2, 3]) if layers == 1 else None
    batch, classes = (episodes or 1) * r.randint(1, 3), r.choice([r.randint(1, 9), r.randint(10, most_classes)])
    image, text, parameters = problem(config, batch, classes, dtype, seed=seed)
    common: list[str] = []
    if episodes and r.random() < 0.7:
        own = [problem(config, batch, classes, dtype, seed=1000 * seed + one)[2] for one in range(1, 1 + episodes)]
        # One tensor in place of a tensor for each episode has a stride of zero.
        common = [name for name in parameters if r.random() < 0.3]
        parameters = {
            name: torch.stack([one[name] for one in (own[:1] * episodes if name in common else own)])
            for name in parameters
        }
    output_is_zero = layers == 1 and r.random() < 0.2
    if output_is_zero:
        parameters |= {name: 0 * value for name, value in parameters.items() if name.startswith("out_proj")}
    scale = torch.tensor(r.choice([1.0, 20.0, 100.0]) / config.input_scale_factor)
    named = {"image": image, "text": text, "scale": scale, **parameters}
    inputs = {name: value.double() for name, value in named.items()}
    layouts = ["as it is", "as it is", "transposed", "apart", "inside"]
    strides = {name: "common" if name in common else r.choice(layouts) for name in inputs}
    # The errors of some gradients are compared with the gradients of the values' projection.
    some = [name for name in inputs if name.startswith("v_proj") or r.random() < 0.5]
    in_loss = [RESULTS, ("logits",), tuple(name for name in RESULTS if r.random() < 0.5)]
    return Call(
        config,
        inputs,
        strides,
        dtype,
        # In 16 bits another element than the exact one may be the farthest from 1.
        r.choice(MASK_PENALTIES if dtype == torch.float32 else ("l2", "l1")),
        episodes,
        output_is_zero,
        r.choice([None, None, 1.0, 2.0]) if layers == 1 else None,
        {name: r.choice(layouts) for name in r.choice(in_loss) or ("logits",)},
        r.choice([[*inputs], [*parameters], ["out_proj.weight"], some]),
    )


def solve_drawn(call: Call, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Return the call's results and the gradients that it asks for, in float64.

    The reference computes it without the layouts, and without the earlier call and the promise, which change nothing.
    """
    fast = backend != "reference"
    leaves = {}
    for name, value in call.inputs.items():
        # A multiplier is not rounded to 16 bits.
        own = torch.float32 if name == "scale" and dtype.itemsize == 2 else dtype
        leaf = as_laid_out(value.to(own), call.strides[name] if fast else "as it is")
        leaves[name] = leaf.requires_grad_(name in call.wanted)

    def adapter(values: dict[str, Tensor], **options: Any) -> Any:
        named = {key: value for key, value in values.items() if key not in ("image", "text", "scale")}
        return rational_adapter(
            leaves["image"], leaves["text"], leaves["scale"], named, call.config, penalty=call.penalty,
            return_mask=True, episodes=call.episodes, backend=backend, **options,
        )  # fmt: skip

    options: dict[str, Any] = {"output_is_zero": call.output_is_zero} if fast else {}
    if fast and call.earlier is not None:
        before = {
            name: value.detach() * (0.5 if name.startswith("out_proj") else call.earlier)
            for name, value in leaves.items()
        }
        before = {name: value.requires_grad_() for name, value in before.items()}
        options["projected"] = adapter(before, keep_projected=True).projected.scaled(1 / call.earlier)
    output = adapter(leaves, **options)
    found = {name: getattr(output, name) for name in RESULTS}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(value.shape, generator=generator).to(dtype) for name, value in found.items()}
    given = [as_laid_out(weights[name], kind if fast else "as it is") for name, kind in call.in_loss.items()]
    asked = [leaves[name] for name in call.wanted]
    gradients = torch.autograd.grad([found[name] for name in call.in_loss], asked, given, materialize_grads=True)
    found |= {f"d{name}": value for name, value in zip(call.wanted, gradients, strict=True)}
    return {name: value.detach().double() for name, value in found.items()}


def assert_drawn_call_is_right(call: Call, fast: dict[str, Tensor]) -> None:
    """Compare a backend's solution of a drawn call with that of the reference in float64."""
    exact, plain = (solve_drawn(call, dtype, "reference") for dtype in (torch.float64, call.dtype))
    for name, value in fast.items():
        assert value.shape == exact[name].shape, name
    # The few logits of a small problem may be far smaller than their terms.
    assert_within_budget(exact, plain, fast, call.dtype, roundings=16 if call.dtype == torch.float32 else 2)
