"""Register operators with PyTorch: schema, implementation, shapes (fake) and gradient, from groups of named values.

PyTorch passes an operator's arguments and results as flat lists. A group is a named tuple or a dataclass whose
annotations give the names and types of some consecutive values of such a list. The schema is made from the groups, and
the functions behind an operator take groups and return groups, so no code depends on a value's position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from rada_fast.ops._backends.transforms import under_transform

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
    """The groups that make up an operator's arguments or results.

    groups: named tuples or dataclasses, in the operator's order.
    results: the groups among these that an operator has returned. An operator cannot return None, so an empty tensor
        (no elements, one axis) stands for an absent result, also where the result is an argument of the next operator.
    prefix: a prefix of every name in the schema.
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
            # This is the group's _make without its check of the number of values.
            make = partial(tuple.__new__, group) if issubclass(group, tuple) else _maker(group)
            decodes = group in results and (Tensor | None) in hints.values()
            self._pieces.append((make, slice(start, len(self.names)), decodes))

    def schema(self) -> str:
        """Return the arguments or results in the form of a schema."""
        return ", ".join(f"{kind} {name}" for kind, name in zip(self._types, self.names, strict=True))

    def split(self, values: Sequence[Any]) -> list[Any]:
        """Return the groups that hold these values, one value for each name."""
        return [
            make([_none_if_empty(value) for value in values[piece]] if decodes else values[piece])
            for make, piece, decodes in self._pieces
        ]


def _maker(group: type[Any]) -> Callable[[Sequence[Any]], Any]:
    return lambda values: group(*values)


def _none_if_empty(value: Tensor) -> Tensor | None:
    return None if value.ndim == 1 and value.numel() == 0 else value


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), int, float, bool, str, torch.dtype})


def runs_at_once(values: Iterable[Any]) -> bool:
    """Return whether an operator with these arguments would only run: nothing traces, counts or transforms it.

    The function behind it may then be called directly, which spares PyTorch's dispatcher some 10 us in every pass.
    """
    return _PLAIN.issuperset(map(type, values)) and torch._C._len_torch_dispatch_stack() == 0 and not under_transform()


def _flat(arguments: Layout, function: Callable[..., Sequence[Any]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that takes an operator's flat arguments and calls a function of groups with them.

    It returns flat results, with an empty tensor in the place of each None.
    """

    def call(*values: Any) -> tuple[Tensor, ...]:
        groups = function(*arguments.split(values))
        like = next(value for value in values if isinstance(value, Tensor))
        results: list[Tensor | None] = []
        for group in groups:
            results += group if isinstance(group, tuple) else vars(group).values()
        return tuple([like.new_empty((0,)) if value is None else value for value in results])

    return call


def register_fake(name: str, arguments: Layout, fake: Callable[..., Sequence[Any]]) -> None:
    """Register the function that gives the shapes of an existing operator's results.

    fake: takes the groups of the arguments and returns the groups of the results.
    """
    torch.library.register_fake(f"rada_fast::{name}", _flat(arguments, fake))


def define(
    name: str,
    arguments: Layout,
    results: Layout,
    implementation: Callable[..., Sequence[Any]],
    fake: Callable[..., Sequence[Any]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Define an operator for CPU and CUDA tensors. Returns the function of flat arguments behind it.

    name: the operator's name.
    arguments, results: the layouts of both, from which the schema is made.
    implementation, fake: take the groups of the arguments and return the groups of the results.
    """
    _library.define(f"{name}({arguments.schema()}) -> ({results.schema()})")
    function = _flat(arguments, implementation)
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)
    register_fake(name, arguments, fake)
    return function


def register_gradient(
    name: str,
    arguments: Layout,
    tensors: Layout,
    differentiable: int,
    formula: Callable[[Sequence[Tensor | None], list[Any], tuple[Tensor, ...], list[Any]], Sequence[Any]],
    function: Callable[..., tuple[Tensor, ...]] | None = None,
) -> None:
    """Register an operator's gradient.

    name: the operator's name.
    arguments: the layout of its arguments.
    tensors: the first of these groups, whose tensors may have gradients; the groups after them are options.
    differentiable: the number of results that have gradients. The results after them are kept for the backward pass.
    formula: takes the gradients of the differentiable results (at least one is not None), the groups of the arguments,
        the kept results, and for each group of `tensors` a group of flags that say which gradients are wanted. It
        returns groups of gradients like those of `tensors`. Gradients that are not wanted may be None.
    function: what `define` returned; None where a library has defined the operator.
    """
    count = len(tensors.names)
    operator = getattr(torch.ops.rada_fast, name).default

    def run(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if function is not None and runs_at_once(arguments) and not keyset.has(torch._C.DispatchKey.Meta):
                return function(*arguments)
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            output = run(keyset, arguments)
            kept = output[differentiable:]
            # Tensors among the options serve the forward pass alone, and are not kept alive.
            ctx.options = [None if isinstance(value, Tensor) else value for value in arguments[count:]]
            ctx.save_for_backward(*arguments[:count], *kept)
            ctx.mark_non_differentiable(*kept)
            # The kept tensors are outputs too; creating gradients of zeros for them would cost what the operator saves.
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            _, *needed = ctx.needs_input_grad
            result_gradients, nothing = gradients[:differentiable], (None,) * len(needed)
            if all(value is None for value in result_gradients):
                return None, *nothing
            saved, wanted = ctx.saved_tensors, needed[:count]
            groups = arguments.split((*saved[:count], *ctx.options))
            gradient_groups = formula(result_gradients, groups, saved[count:], tensors.split(wanted))
            values = [value for group in gradient_groups for value in group]
            wanted_values = [value if asked else None for value, asked in zip(values, wanted, strict=True)]
            return None, *wanted_values, *nothing[count:]

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Gradient.apply(keyset, *arguments)
        return run(keyset, arguments)

    # This does what torch.library.register_autograd does, except for the search for arguments left at their defaults.
    # Our schemas have no defaults, and for the adapter's 24 arguments the search takes 0.17 ms of every call.
    _library.impl(name, autograd, "Autograd", with_keyset=True)
