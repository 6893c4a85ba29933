"""Launch Triton kernels with little work on the host: what a launch has in common with an earlier one is done once.

Triton's own call binds the arguments to the parameters, decides for each what the kernel is compiled for, and looks the
compiled kernel up, which takes longer than a small kernel runs. So a launcher makes a Launch of everything that is no
tensor, once for equal sizes and options, and the Launch remembers the compiled kernel. Where Triton is replaced, by its
interpreter or by a simulator, every launch is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import itemgetter, or_
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

NUMBERS = (
    "batch",
    "images",
    "classes",
    "tiles",
    "query_tiles",
    "parts",
    "groups",
    "group_images",
    "num_counters",
    "num_zeros",
    "total_rows",
    "images_per_text",
    "num_views",
    "lines",
    "text_lines",
    "image_lines",
    "elements",
    "scale",
    "share",
)
"""The parameters for whose values no kernel is compiled anew. Triton would compile one kernel for the number 1, one for
multiples of 16 and one for other numbers, so a last batch with fewer images would wait for the compiler."""

ALIGNMENT = 16
"""The bytes by which all pointers of a remembered kernel can be divided, as it was compiled for such pointers."""

remembered = lru_cache(maxsize=1024)
"""A decorator for functions that make a Launch of sizes and options. It keeps the results of the latest calls."""


def is_replaced() -> bool:
    """Return whether something has taken the place of Triton's launcher, such as a simulator or a recorder."""
    return JITFunction.run.__module__ != JITFunction.__module__


class Kernel:
    """A Triton entry point. Its parameters stand in the order that the package's docstring describes: tensors, numbers,
    compile-time constants.

    kernel.launch(grid, number=..., CONSTANT=..., num_warps=4) makes a Launch, which is then called with the tensors.
    kernel[grid](...) is Triton's own call with all arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.jit: Any = triton.jit(do_not_specialize=NUMBERS)(function)
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        constants = [name for name in names if "constexpr" in str(parameters[name].annotation)]
        tensors = next(at for at, name in enumerate(names) if name in (*NUMBERS, *constants))
        self.tensors, self.others = names[:tensors], names[tensors:]

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
        own: Callable[..., Any] = self.jit[grid]
        return own

    def launch(self, grid: Sequence[int], **arguments: Any) -> Launch:
        """Return a launch on a grid, with every argument that is no tensor, and with options such as num_warps."""
        return Launch(self, grid, arguments)


class Launch:
    """A launch that waits for its tensors: launch(name=tensor or None, ...). It may be called any number of times."""

    def __init__(self, kernel: Kernel, grid: Sequence[int], arguments: dict[str, Any]) -> None:
        self._jit, self._grid, self._arguments = kernel.jit, (*grid, 1, 1)[:3], arguments
        self._tensors: Callable[[dict[str, Tensor | None]], tuple[Tensor | None, ...]] = itemgetter(*kernel.tensors)
        self._others = tuple(arguments[name] for name in kernel.others)
        # Triton's interpreter compiles nothing.
        self._is_compiled = isinstance(kernel.jit, JITFunction)
        # They are compiled for this launch's own numbers, so one that exceeds 32 bits has code for 64.
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, **tensors: Tensor | None) -> None:
        if is_replaced() or not self._is_compiled:
            self._jit[self._grid](**tensors, **self._arguments)
            return
        values = self._tensors(tensors)
        pointers = [None if value is None else value.data_ptr() for value in values]
        device = driver.active.get_current_device()
        key = (device, *[None if value is None else value.dtype for value in values])
        compiled = self._compiled.get(key)
        # A bit that is set in one address is set in this number.
        together = reduce(or_, filter(None, pointers), 0)
        if together % ALIGNMENT:
            self._jit[self._grid](**tensors, **self._arguments)
        elif compiled is None:
            launched = self._jit[self._grid](**tensors, **self._arguments)
            if isinstance(launched, CompiledKernel):
                self._compiled[key] = launched
        else:
            stream = driver.active.get_current_stream(device)
            compiled[self._grid](*pointers, *self._others, stream=stream)
