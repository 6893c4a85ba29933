"""Launch kernels with little work on the host: what a launch has in common with an earlier one is done once.

Triton's own call binds the arguments to the parameters, decides for each what the kernel is compiled for, and looks the
compiled kernel up, which takes longer than a small kernel runs. A Kernel remembers the compiled kernel for everything
that decides about it. Where Triton is replaced, by its interpreter or by a simulator, every launch is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

NUMBERS = (
    "batch",
    "images",
    "classes",
    "tiles",
    "parts",
    "num_counters",
    "total_rows",
    "images_per_text",
    "elements",
    "scale",
    "share",
)
"""The parameters for whose values no kernel is compiled anew. Triton would compile one kernel for the number 1, one for
multiples of 16 and one for other numbers, so a last batch with fewer images would wait for the compiler."""

OPTIONS = ("num_warps", "num_stages")
"""The options of Triton that a launch may give beside the kernel's parameters."""

ALIGNMENT = 16
"""The bytes by which all pointers of a remembered kernel can be divided, as it was compiled for such pointers."""
MAX_NUMBER = 2**31 - 1
"""The largest number that a remembered kernel takes, as it was compiled for 32 bits."""


def is_replaced() -> bool:
    """Return whether something has taken the place of Triton's launcher, such as a simulator or a recorder."""
    return JITFunction.run.__module__ != JITFunction.__module__


class Kernel:
    """A Triton entry point, launched as usual: kernel[grid](name=value, ..., num_warps=4).

    All arguments are given by name. The parameters stand in the order that the package's docstring describes: tensors,
    numbers, compile-time constants.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.jit: Any = triton.jit(do_not_specialize=NUMBERS)(function)
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        constants = [name for name in names if "constexpr" in str(parameters[name].annotation)]
        self._tensors = next(at for at, name in enumerate(names) if name in (*NUMBERS, *constants))
        self._constants = len(names) - len(constants)
        self._fixed = (*OPTIONS, *(name for name in names[self._tensors :] if name not in NUMBERS))
        self._values: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*names)
        self._interpreted = not isinstance(self.jit, JITFunction)
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], /, **arguments: Any) -> None:
        if self._interpreted or is_replaced():
            self.jit[grid](**arguments)
            return
        values = self._values(arguments)
        pointers: list[int | None] = []
        types = []
        together = 0
        for tensor in values[: self._tensors]:
            if tensor is None:
                pointers.append(None)
                types.append(None)
            else:
                address = tensor.data_ptr()
                together |= address
                pointers.append(address)
                types.append(tensor.dtype)
        device = driver.active.get_current_device()
        key = (device, *map(arguments.get, self._fixed), *types)
        compiled = self._compiled.get(key)
        usual = together % ALIGNMENT == 0 and max(values[self._tensors : self._constants]) <= MAX_NUMBER
        if compiled is not None and usual:
            stream = driver.active.get_current_stream(device)
            compiled[(*grid, 1, 1)](*pointers, *values[self._tensors :], stream=stream)
            return
        launched = self.jit[grid](**arguments)
        if usual and isinstance(launched, CompiledKernel):
            self._compiled[key] = launched
