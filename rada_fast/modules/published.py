"""Whether a call of a live published adapter may be served by rada_fast's op: all that must hold for it, every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from rada_fast.config import AdapterConfig
from rada_fast.modules.projections import reason_to_call, tensors_or_calls
from rada_fast.ops.rational_adapter import rational_adapter

PROJECTIONS = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")
ARGUMENTS = ("query1", "query2", "query3", "key", "value", "attn_mask")

_UNUSED = {"alpha"}
"""A parameter that some published modules have and never use."""
_SIMPLE = (bool, int, float, str, type(None))
_REPEATING = {"MulBackward0", "RepeatBackward0", "ExpandBackward0", "UnsqueezeBackward0"}
"""Gradient nodes between the published queries and the features that they repeat."""


def projections_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The projections under the standard names; None for one that is not there."""
    children = module._modules
    first = "q_proj1" if "q_proj1" in children else "q_proj"
    return {name: children.get(first if name == "q_proj1" else name) for name in PROJECTIONS}


def adapter_config(module: Any, **changes: Any) -> AdapterConfig:
    """A published module's arithmetic."""
    return AdapterConfig(
        embed_dim=module.out_proj.in_features,
        num_heads=module.num_heads,
        temperature=float(module.temprature),
        bias=module.out_proj.bias is not None,
        **changes,
    )


def reason_against(
    module: nn.Module, own: Callable[..., Any], given: Mapping[str, Any], state: dict[str, Any]
) -> str | None:
    """Why a call is left to the module's own forward, or None where rada_fast's op computes the same.

    own: the class's forward as it was, of any instance; given: the call's arguments by name; state: what was found
    about the module before, kept with it.
    """
    names = [name for name in ARGUMENTS[:5] if name != "query3" or "q_proj1" in module._modules]
    if set(given) - {"attn_mask"} != set(names) or not all(isinstance(given[name], Tensor) for name in names):
        return "it is called with other arguments than the published module"
    if given.get("attn_mask") is not None:
        return "attn_mask is given"
    dropout = module._modules.get("dropout")
    if module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return "dropout is active"
    for name, layer in projections_of(module).items():
        if layer is None or (reason := reason_to_call(layer)):
            return f"its {name} {reason if layer is not None else 'is missing'}"
    rows = [given[name] for name in names]
    return (
        _reason_of_state(module)
        or _reason_of_form(module, rows)
        or _reason_of_arithmetic(module, own, names, state)
        or _reason_of_values(rows)
    )


def _reason_of_state(module: nn.Module) -> str | None:
    """Something that the published module does not hold, and that a forward could use."""
    known = {*PROJECTIONS, "q_proj", "dropout"}
    odd = [name for name, child in module._modules.items() if name not in known and child is not None]
    for held in (module._parameters, module._buffers, module.__dict__):
        odd += [name for name, value in held.items() if isinstance(value, Tensor) and name not in _UNUSED]
    return f"it holds {odd[0]}, which the published module does not" if odd else None


def _reason_of_arithmetic(
    module: nn.Module, own: Callable[..., Any], names: Sequence[str], state: dict[str, Any]
) -> str | None:
    """Whether the module's own forward is the published one, tried once for each of the module's settings."""
    settings = tuple((key, value) for key, value in module.__dict__.items() if isinstance(value, _SIMPLE))
    key = (type(module), own, settings)
    if state.get("tried") != key:
        state["tried"], state["reason"] = key, _try(module, own, names)
    reason: str | None = state["reason"]
    return reason


def _try(module: nn.Module, own: Callable[..., Any], names: Sequence[str]) -> str | None:
    """Compare the own forward with the op in float64 on drawn inputs and weights: the real ones may be zero."""
    config = adapter_config(module, input_scale="none", mask_activation="none")
    width = config.embed_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__["_modules"] = dict(module._modules)
        for name in projections_of(module):
            layer = nn.Linear(width, width, bias=config.bias, device="meta")
            layer.weight = nn.Parameter(draw(width, width) / math.sqrt(width))
            if config.bias:
                layer.bias = nn.Parameter(draw(width) / math.sqrt(width))
            twin._modules["q_proj" if name == "q_proj1" and name not in module._modules else name] = layer
        image, text = draw(2, 1, width), draw(1, 3, width)
        rows = {"query1": image.repeat(1, 3, 1), "query2": text.repeat(2, 1, 1)}
        try:
            with torch.autocast("cpu", enabled=False):
                found = own(twin, *(rows.get(name, image * text) for name in names))[0]
                layers = {name: layer for name, layer in projections_of(twin).items() if layer is not None}
                wanted = rational_adapter(
                    image[:, 0], text[0], 1.0, tensors_or_calls(layers), config, return_mask=True, backend="reference"
                ).mask
                assert wanted is not None
                error = float((found.double() - (wanted - 1)).abs().max() / (wanted - 1).abs().max())
        except Exception as problem:  # a forward of someone else's can fail in any way
            return f"its own forward could not be tried: {' '.join(str(problem).split())[:200]}"
    return None if error < 1e-5 else "its own forward computes something else than the published one"


def _reason_of_form(module: nn.Module, rows: list[Tensor]) -> str | None:
    """Whether the inputs have values to be compared, of one shape and type."""
    first = rows[0]
    layer: Any = module._modules["out_proj"]
    # Not its weight where it has parameters: of a parametrised layer that would be computed. Replicas have none.
    parameter = next(layer.parameters(), None)
    weight: Tensor = layer.weight if parameter is None else parameter
    for row in rows:
        if row.ndim != 3 or row.shape != first.shape or row.dtype != first.dtype or row.device != weight.device:
            return "its inputs are not of one shape (B, K, D) and one type, on its own device"
        if row.is_meta or type(row) not in (Tensor, nn.Parameter):
            return "the values of its inputs cannot be compared"
    if first.dtype != weight.dtype and not torch.is_autocast_enabled(first.device.type):
        return f"its inputs are {first.dtype}, its parameters {weight.dtype}"
    return "the batch is empty" if first.numel() == 0 else None


def _reason_of_values(rows: list[Tensor]) -> str | None:
    """Whether the inputs are one row per image, one row per class and their product, also in their gradients."""
    if torch.is_grad_enabled() and any(row.requires_grad for row in rows) and not _flows_as_published(rows):
        return "gradients reach its inputs by other ways than the published model's"
    query_fits, text_fits, product_fits = _compare([row.detach() for row in rows])
    if not query_fits or not text_fits:
        return "its queries are not one row per image and one row per class"
    return None if product_fits else "its keys are not the product of its image and text queries"


def _compare(rows: list[Tensor]) -> list[bool]:
    """Whether the image's rows are alike, the text's, and all others their product; read from the device once."""
    query1, query2, *products = rows
    image, text = query1[:, :1], query2[:1]
    product = image * text
    # One buffer for all that follows: fresh memory of this size costs ten times what is done with it.
    scratch = torch.empty_like(product)

    def largest_difference(left: Tensor, right: Tensor) -> Tensor:
        return torch.sub(left, right, out=scratch).abs_().flatten(1).amax(dim=1)  # (B,), NaN where there is one

    # s R computed as (sqrt(s) f) (sqrt(s) T) or as s (f T): three roundings apart, plus the square root's.
    allowed = 8 * torch.finfo(product.dtype).eps * torch.abs(product, out=scratch).flatten(1).amax(dim=1)  # (B,)
    zero = torch.zeros_like(allowed)
    query_fits = largest_difference(query1, image) <= zero
    text_fits = largest_difference(query2, text) <= zero
    product_fits = torch.ones_like(query_fits)
    for at, part in enumerate(products):
        if not any(part is other for other in products[:at]):
            product_fits = product_fits & (largest_difference(part, product) <= allowed)
    fits: list[bool] = torch.stack([query_fits, text_fits, product_fits]).all(dim=1).tolist()
    return fits


def _flows_as_published(rows: list[Tensor]) -> bool:
    """Whether products and queries come from the same two features, by the published model's own steps.

    Equal values do not tell: a detached factor, or another path to one, has them too.
    """
    query1, query2, *products = rows
    ways = [_repeated_from(query) if query.requires_grad else [] for query in (query1, query2)]
    return all(_is_product(product, *ways) for product in products)


Edge = tuple[Any, int]


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _live(node: Any) -> list[Edge]:
    return [(node, index) for node, index in node.next_functions if node is not None]


def _repeated_from(query: Tensor) -> list[Edge]:
    """The query's own edge and those behind it, as far as constants and repetition alone lie between."""
    edges = [_edge(query)]
    while len(edges) < 8 and edges[-1][0].name() in _REPEATING:
        behind = _live(edges[-1][0])
        if len(behind) != 1:
            break
        edges += behind
    return edges


def _is_product(tensor: Tensor, image: list[Edge], text: list[Edge]) -> bool:
    """Whether a tensor is constants times an edge of the image's, of the text's, or of the product of both."""
    if not tensor.requires_grad:
        return False
    edge = _edge(tensor)
    for _ in range(4):
        if not (image and text) and edge in (image or text):
            return True
        if edge[0].name() != "MulBackward0":
            return False
        behind = _live(edge[0])
        if len(behind) == 2:
            one, other = behind
            return (one in image and other in text) or (other in image and one in text)
        (edge,) = behind
    return False
