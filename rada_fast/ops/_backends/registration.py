"""Registers operators with PyTorch: schema, implementation, shapes (fake) and gradient, from groups of named values.

PyTorch hands an operator's arguments and results over as flat lists. A group is a named tuple or a dataclass whose
annotations say the names and types of some of them, one after the other. The schema is made from the groups, and the
functions behind an operator take groups and return groups, so that nothing is found by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    list[bool]: "bool[]",
}

_library = torch.library.Library("rada_fast", "FRAGMENT")


class Layout:
    """Groups that make up an operator's arguments or results.

    groups: named tuples or dataclasses, in the operator's order.
    results: those of the groups that an operator has returned. Operators return no None: an empty tensor (no elements,
        one axis) stands for a result that is absent, also where such a result is an argument of the next operator.
    prefix: stands before every name in the schema.
    """

    def __init__(self, *groups: type[Any], results: Sequence[type[Any]] = (), prefix: str = "") -> None:
        self.names: list[str] = []
        self._types: list[str] = []
        self._pieces: list[tuple[Callable[[Sequence[Any]], Any], slice, bool]] = []
        for group in groups:
            hints = get_type_hints(group)
            start = len(self.names)
            self.names += [prefix + name for name in hints]
            self._types += ["Tensor" if group in results else _SCHEMA_TYPES[kind] for kind in hints.values()]
            # What _make does, without counting the values.
            make = partial(tuple.__new__, group) if issubclass(group, tuple) else _maker(group)
            decodes = group in results and (Tensor | None) in hints.values()
            self._pieces.append((make, slice(start, len(self.names)), decodes))

    def schema(self) -> str:
        """The arguments or results as a schema lists them."""
        return ", ".join(f"{kind} {name}" for kind, name in zip(self._types, self.names, strict=True))

    def split(self, values: Sequence[Any]) -> list[Any]:
        """The groups that hold these values, of which there is one for each name."""
        return [
            make([_none_if_empty(value) for value in values[piece]] if decodes else values[piece])
            for make, piece, decodes in self._pieces
        ]


def _maker(group: type[Any]) -> Callable[[Sequence[Any]], Any]:
    return lambda values: group(*values)


def _none_if_empty(value: Tensor) -> Tensor | None:
    return None if value.ndim == 1 and value.numel() == 0 else value


def _flat(arguments: Layout, function: Callable[..., Sequence[Any]]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of groups as one of an operator's arguments; an empty tensor takes the place of a None it returns."""

    def call(*values: Any) -> tuple[Tensor, ...]:
        groups = function(*arguments.split(values))
        like = next(value for value in values if isinstance(value, Tensor))
        found: list[Tensor | None] = []
        for group in groups:
            found += group if isinstance(group, tuple) else vars(group).values()
        return tuple([like.new_empty((0,)) if value is None else value for value in found])

    return call


def register_fake(name: str, arguments: Layout, fake: Callable[..., Sequence[Any]]) -> None:
    """Register what computes the results' shapes of an operator that exists.

    fake: of the groups of the arguments, the groups of the results.
    """
    torch.library.register_fake(f"rada_fast::{name}", _flat(arguments, fake))


def define(
    name: str,
    arguments: Layout,
    results: Layout,
    implementation: Callable[..., Sequence[Any]],
    fake: Callable[..., Sequence[Any]],
) -> None:
    """Make an operator for CPU and CUDA tensors.

    implementation, fake: of the groups of the arguments, the groups of the results.
    """
    _library.define(f"{name}({arguments.schema()}) -> ({results.schema()})")
    for device in ("CPU", "CUDA"):
        _library.impl(name, _flat(arguments, implementation), device)
    register_fake(name, arguments, fake)


def register_gradient(
    name: str,
    arguments: Layout,
    tensors: Layout,
    differentiable: int,
    formula: Callable[[Sequence[Tensor | None], list[Any], tuple[Tensor, ...], list[Any]], Sequence[Any]],
) -> None:
    """Register an operator's gradient.

    tensors: the groups that the arguments begin with, which may have gradients; the groups after them are options.
    differentiable: how many of the results have gradients. The results after them are kept for the backward pass.
    formula: of the gradients of those results (one of them is not None), the arguments' groups, the kept results, and
        for each group of tensors which gradients are wanted; it returns the gradients as groups like the tensors'.
        Gradients that are not wanted may be None.
    """
    count = len(tensors.names)
    operator = getattr(torch.ops.rada_fast, name).default

    def run(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            output = run(keyset, arguments)
            kept = output[differentiable:]
            ctx.options = arguments[count:]
            ctx.save_for_backward(*arguments[:count], *kept)
            ctx.mark_non_differentiable(*kept)
            # The kept tensors are outputs too; gradients of zeros for them would cost what the operator saves.
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            _, *needed = ctx.needs_input_grad
            given, nothing = gradients[:differentiable], (None,) * len(needed)
            if all(value is None for value in given):
                return None, *nothing
            saved, wanted = ctx.saved_tensors, needed[:count]
            taken = arguments.split((*saved[:count], *ctx.options))
            groups = formula(given, taken, saved[count:], tensors.split(wanted))
            found = [value for group in groups for value in group]
            chosen = [value if asked else None for value, asked in zip(found, wanted, strict=True)]
            return None, *chosen, *nothing[count:]

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Gradient.apply(keyset, *arguments)
        return run(keyset, arguments)

    # What torch.library.register_autograd does, without its search for arguments left at their defaults: our schemas
    # have none, and for the 24 arguments of the adapter it takes 0.17 ms of every call.
    _library.impl(name, autograd, "Autograd", with_keyset=True)
