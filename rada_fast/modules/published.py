"""Verify, on every call of a live published adapter, that rada_fast's op computes what its own forward would."""

from __future__ import annotations

import dataclasses
import enum
import math
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from rada_fast.config.method import ROLES, AdapterConfig
from rada_fast.modules.projections import has_bias, has_hooks, reason_to_call, tensors_or_calls
from rada_fast.ops.rational_adapter import rational_adapter

PROJECTIONS = tuple(ROLES.values())
ARGUMENTS = ("query1", "query2", "query3", "key", "value", "attn_mask")

_UNUSED = {"alpha"}
"""A parameter that some published modules have and never use."""
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic, enum.Enum)
_BY_IDENTITY = (types.FunctionType, types.BuiltinFunctionType, type, staticmethod, classmethod, property)
_OF_EVERY_MODULE = (frozenset(nn.Module().__dict__) - {"training"}) | {
    "_rada_fast_state",
    "_rada_fast_off",
    "_former_parameters",
}
_MAX_SETTINGS = 200
_MAX_TRIALS = 16
"""The most settings and shapes that are remembered. For further shapes the results of these decide."""
_MAX_SCORES = 2**21
"""The most attention scores of a trial on all of a call's inputs; of a larger call only a part is tried."""
_REPEATING = {"MulBackward0", "RepeatBackward0", "ExpandBackward0", "UnsqueezeBackward0"}
"""The names of the gradient nodes that may lie between the published queries and the features that they repeat."""


def projections_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the projections by their standard names, with None for one that is missing."""
    children = module._modules
    first = "q_proj1" if "q_proj1" in children else "q_proj"
    return {name: children.get(first if name == "q_proj1" else name) for name in PROJECTIONS}


def adapter_config(module: Any, **changes: Any) -> AdapterConfig:
    """Return the configuration of a published module's arithmetic."""
    return AdapterConfig(
        embed_dim=module.out_proj.in_features,
        num_heads=int(module.num_heads),
        temperature=float(module.temprature),
        bias=has_bias(module.out_proj),
        **changes,
    )


def reason_against(
    module: nn.Module, own: Callable[..., Any], given: Mapping[str, Any], state: dict[str, Any]
) -> str | None:
    """Return why the module's own forward has to serve a call, or None where rada_fast's op computes the same.

    module: the published module.
    own: the forward of its original class, an unbound function.
    given: the call's arguments by name.
    state: the results of earlier calls, which are kept with the module.
    """
    names = [name for name in ARGUMENTS[:5] if name != "query3" or "q_proj1" in module._modules]
    if set(given) - {"attn_mask"} != set(names) or not all(isinstance(given[name], Tensor) for name in names):
        return "it is called with other arguments than the published module"
    if given.get("attn_mask") is not None:
        return "attn_mask is given"
    if reason := _reason_of_dropout(module._modules.get("dropout")):
        return reason
    layers = projections_of(module)
    for name, layer in layers.items():
        if layer is None or (reason := reason_to_call(layer)):
            return f"its {name} {reason if layer is not None else 'is missing'}"
    rows = [given[name] for name in names]
    return (
        _reason_of_state(module)
        or _reason_of_widths(layers)
        or _reason_of_form(module, rows)
        or _reason_of_values(rows)
        or _reason_of_arithmetic(module, own, names, rows, state)
    )


def _reason_of_dropout(dropout: nn.Module | None) -> str | None:
    if dropout is None:
        return None
    if has_hooks(dropout):
        return "its dropout has hooks"
    if type(dropout) not in (nn.Dropout, nn.Identity) or "forward" in dropout.__dict__:
        return f"its dropout is a {type(dropout).__name__} with a forward of its own"
    return "dropout is active" if dropout.training and getattr(dropout, "p", 0) > 0 else None


def _reason_of_widths(layers: Mapping[str, Any]) -> str | None:
    """Return why the projections do not fit, or None where they have one width and all or none have a bias."""
    output = layers["out_proj"]
    width, bias = output.in_features, has_bias(output)
    for name, layer in layers.items():
        if layer.in_features != width or layer.out_features != width:
            return f"its {name} is {layer.in_features} to {layer.out_features} wide, not {width} to {width}"
        if has_bias(layer) != bias:
            return "some of its projections have a bias and some have none"
    return None


def _reason_of_state(module: nn.Module) -> str | None:
    """Name a tensor or child that the published module does not have and that a forward could use, or return None."""
    known = {*PROJECTIONS, "q_proj", "dropout"}
    unknown = [name for name, child in module._modules.items() if name not in known and child is not None]
    for members in (module._parameters, module._buffers, module.__dict__):
        unknown += [name for name, value in members.items() if isinstance(value, Tensor) and name not in _UNUSED]
    return f"it holds {unknown[0]}, which the published module does not" if unknown else None


class _NotComparableError(Exception):
    """Raised for a setting whose changes cannot be noticed."""


def _frozen(value: Any, budget: list[int]) -> Any:
    """Return a copy of a setting that differs from a later copy if the setting has changed in place."""
    budget[0] -= 1
    if budget[0] < 0:
        raise _NotComparableError
    if isinstance(value, (*_SIMPLE, *_BY_IDENTITY)):
        return value
    kind = type(value)
    parts: list[Any] = [kind]
    if isinstance(value, Mapping):
        parts += [(str(key), _frozen(one, budget)) for key, one in value.items()]
    elif isinstance(value, list | tuple | set | frozenset | range):
        parts += [_frozen(one, budget) for one in value]
    elif not (dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace)):
        raise _NotComparableError
    parts += [(name, _frozen(one, budget)) for name, one in getattr(value, "__dict__", {}).items()]
    return tuple(parts)


def _settings(module: nn.Module, own: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield everything except the projections on which the module's forward could depend, by name.

    This covers its attributes, those of its classes, and the plain values that its functions take from outside.
    """
    for name, value in module.__dict__.items():
        if name not in _OF_EVERY_MODULE:
            yield name, value
    functions = [own]
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        if kind.__module__ == "rada_fast.compat":
            continue
        for name, value in vars(kind).items():
            if not name.startswith("__"):
                yield name, value
                functions.append(value)
    for function in functions:
        if isinstance(function, types.FunctionType):
            around = function.__globals__
            for name in function.__code__.co_names:
                if isinstance(value := around.get(name), _SIMPLE) and name in around:
                    yield name, value
            for cell in function.__closure__ or ():
                try:
                    value = cell.cell_contents
                except ValueError:  # The variable has no value yet.
                    continue
                if isinstance(value, _SIMPLE):
                    yield "", value


def _reason_of_arithmetic(
    module: nn.Module, own: Callable[..., Any], names: Sequence[str], rows: list[Tensor], state: dict[str, Any]
) -> str | None:
    """Return why the module's own forward is not the published one, or None; each setting and shape is tried once."""
    budget = [_MAX_SETTINGS]
    settings: list[Any] = [type(module), own]
    name = ""
    try:
        for name, value in _settings(module, own):
            settings.append((name, _frozen(value, budget)))
    except _NotComparableError:
        return f"it holds {name}, whose changes cannot be noticed"
    if state.get("settings") != settings:
        state["settings"], state["tried"] = settings, {}
    tried: dict[tuple[int, ...], str | None] = state["tried"]
    shape = tuple(rows[0].shape)
    if shape not in tried:
        if len(tried) >= _MAX_TRIALS:
            return next((reason for reason in tried.values() if reason), None)
        tried[shape] = _try(module, own, names, rows)
    return tried[shape]


def _try(module: nn.Module, own: Callable[..., Any], names: Sequence[str], rows: list[Tensor]) -> str | None:
    """Compare the module's own forward with the op in float64, with random weights because the real ones may be zero.

    The first inputs are random. The second are the call's own, because the forward may depend on their values or shape.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    random_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            config = adapter_config(module, input_scale="none", mask_activation="none")
            twin = _drawn_twin(module, config, draw)
            layers = {name: layer for name, layer in projections_of(twin).items() if layer is not None}
            tensors = tensors_or_calls(layers, bias=config.bias)
            batch, classes, width = rows[0].shape
            if batch * config.num_heads * classes**2 > _MAX_SCORES:
                batch, classes = min(batch, 2), min(classes, 64)
            called = [row.detach().to("cpu", torch.float64) for row in (rows[0][:batch, :1], rows[1][:1, :classes])]
            for image, text in ((draw(2, 1, width), draw(1, 3, width)), called):
                B, K, product = len(image), text.shape[1], image * text
                given = {"query1": image.repeat(1, K, 1), "query2": text.repeat(B, 1, 1)}
                found = own(twin, *(given.get(name, product) for name in names))[0]
                wanted = rational_adapter(
                    image[:, 0], text[0], 1.0, tensors, config, return_mask=True, backend="reference"
                ).mask
                assert wanted is not None
                difference = (found.double() - (wanted - 1)).abs().max()
                if not bool(difference <= 1e-5 * (wanted - 1).abs().max()):
                    return "its own forward computes something else than the published one"
        if not torch.equal(random_state, torch.get_rng_state()) or python_state != random.getstate():
            return "its own forward draws random numbers"
    except Exception as problem:  # Somebody else's forward can fail in any way.
        return f"its own forward could not be tried: {' '.join(str(problem).split())[:200]}"
    finally:
        torch.set_rng_state(random_state)
        random.setstate(python_state)
    return None


def _drawn_twin(module: nn.Module, config: AdapterConfig, draw: Callable[..., Tensor]) -> nn.Module:
    """Return a copy of the module with plain projections of random weights on the CPU; it shares everything else."""
    width = config.embed_dim
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    for name in projections_of(module):
        layer = nn.Linear(width, width, bias=config.bias, device="meta")
        layer.weight = nn.Parameter(draw(width, width) / math.sqrt(width))
        if config.bias:
            layer.bias = nn.Parameter(draw(width) / math.sqrt(width))
        twin._modules["q_proj" if name == "q_proj1" and name not in module._modules else name] = layer
    return twin


def _reason_of_form(module: nn.Module, rows: list[Tensor]) -> str | None:
    """Return why the inputs cannot be compared, or None where they have values, one shape and one type."""
    first = rows[0]
    layer: Any = module._modules["out_proj"]
    # A parametrised layer would compute its weight, so a parameter is read. Replicas have a weight but no parameters.
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
    """Return why the inputs or their gradients are not those of the published model, or None where they are.

    The published model passes a row for each image, a row for each class, and the product of both.
    """
    if torch.is_grad_enabled() and any(row.requires_grad for row in rows):
        if any(row.retains_grad or row._backward_hooks for row in rows):
            return "the gradients of its inputs are retained or hooked"
        if not _flows_as_published(rows):
            return "gradients reach its inputs by other ways than the published model's"
    query_fits, text_fits, product_fits = _compare([row.detach() for row in rows])
    if not query_fits or not text_fits:
        return "its queries are not one row per image and one row per class"
    return None if product_fits else "its keys are not the product of its image and text queries"


def _compare(rows: list[Tensor]) -> list[bool]:
    """Return whether each image's rows are equal, whether each class's are, and whether all others are their product.

    The three results are read from the device at once.
    """
    query1, query2, *products = rows
    image, text = query1[:, :1], query2[:1]
    product = image * text
    # One buffer serves all comparisons, because allocating one of this size takes ten times as long as a comparison.
    scratch = torch.empty_like(product)

    def largest_difference(left: Tensor, right: Tensor) -> Tensor:
        return torch.sub(left, right, out=scratch).abs_().flatten(1).amax(dim=1)  # (B,), NaN if a difference is NaN

    # s R may be computed as (sqrt(s) f) (sqrt(s) T) or as s (f T), which differ by seven roundings, those of the square
    # root included. Elements far below an image's largest may be rounded more coarsely, as float16 is below 6e-5.
    eps = torch.finfo(product.dtype).eps
    allowed = torch.abs(product)
    allowed.mul_(5 * eps).add_(allowed.flatten(1).amax(dim=1)[:, None, None] / 20)  # a quarter of eps of the largest
    zero = product.new_zeros(len(product))
    query_fits = largest_difference(query1, image) <= zero
    text_fits = largest_difference(query2, text) <= zero
    product_fits = torch.ones_like(query_fits)
    for at, part in enumerate(products):
        if not any(part is other for other in products[:at]):
            over = torch.sub(part, product, out=scratch).abs_().sub_(allowed).flatten(1).amax(dim=1)  # (B,)
            product_fits = product_fits & (over <= zero)
    fits: list[bool] = torch.stack([query_fits, text_fits, product_fits]).all(dim=1).tolist()
    return fits


def _flows_as_published(rows: list[Tensor]) -> bool:
    """Return whether products and queries come from the same two features, by the published model's own steps.

    Equal values are no proof: a factor that is detached, or comes from elsewhere, has the same values.
    """
    query1, query2, *products = rows
    paths = [_repeated_from(query) if query.requires_grad else [] for query in (query1, query2)]
    return all(_is_product(product, *paths) for product in products)


Edge = tuple[Any, int]


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _live(node: Any) -> list[Edge]:
    return [(node, index) for node, index in node.next_functions if node is not None]


def _repeated_from(query: Tensor) -> list[Edge]:
    """Return the query's gradient edge and the edges behind it that only constants and repetition separate from it."""
    edges = [_edge(query)]
    while len(edges) < 8 and edges[-1][0].name() in _REPEATING:
        behind = _live(edges[-1][0])
        if len(behind) != 1:
            break
        edges += behind
    return edges


def _is_product(tensor: Tensor, image: list[Edge], text: list[Edge]) -> bool:
    """Return whether a tensor is a product, up to constants, of one of the image's edges and one of the text's.

    Where only one of the two has edges, the tensor has to be one of these edges up to constants.
    """
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
