"""Notice that a module was changed, at a fraction of the time that looking through it takes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn


class ModuleState:
    """What a module consisted of at one time: the attributes, parameters, parts and hooks of it and of its parts.

    Setting any attribute counts as a change. So does an optimiser's step, or any other write to a parameter that
    PyTorch counts, and a write that replaces the memory of a parameter. A write into the memory of ``parameter.data``,
    or of a NumPy array that shares it, does not, because PyTorch keeps no record of it.

    module: the module.
    owners: modules around it, whose parts are not looked into.
    """

    def __init__(self, module: nn.Module, owners: Iterable[nn.Module] = ()) -> None:
        self._modules = [*owners, *module.modules()]
        self._tables: list[dict[Any, Any]] = []
        for part in self._modules:
            tables = (part._parameters, part._buffers, part._modules, part._forward_hooks, part._forward_pre_hooks)
            self._tables += [part.__dict__, *tables]
        # The objects themselves are kept, because a new object might get the address of one that is gone.
        self._objects = self._found()
        self._identities = list(map(id, self._objects))
        self._parameters = list(module.parameters())
        self._writes = self._counted_writes()

    def is_current(self) -> bool:
        """Return whether nothing was changed since then."""
        return list(map(id, self._found())) == self._identities and self._counted_writes() == self._writes

    def _found(self) -> list[Any]:
        return [*map(type, self._modules), *chain.from_iterable(map(dict.values, self._tables))]

    def _counted_writes(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]
