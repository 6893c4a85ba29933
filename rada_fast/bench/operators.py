"""Count the time inside of compiled operators in place: between entering and leaving them, wherever they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import torch

from rada_fast.ops import backends

TRAINING_OPERATORS = {
    "rational_adapter": "forward",
    "prediction_loss": "loss",
    "rational_adapter_backward": "backward",
    "episodic_optimizer_step": "update",
}
"""The operators that a step of a training calls directly on a CPU, and what each is called in the table."""


class OperatorClock:
    """Count the seconds for which each of some compiled operators was at work.

    Reading the clock takes a step some microseconds longer, none of which are inside of an operator.

    operators: the names of operators of the library rada_fast, and what each is called.
    """

    def __init__(self, operators: Mapping[str, str] = TRAINING_OPERATORS) -> None:
        # The operators are not there before the extension is loaded, or without it.
        there = backends()["cpu"] == "usable"
        self._operators = {getattr(torch.ops.rada_fast, own): name for own, name in operators.items() if there}
        self._nanoseconds = dict.fromkeys(operators.values(), 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the calls of operators that are looked up while the context lasts.

        An operator that was looked up within such a context, as a prepared adapter does, is counted afterwards too.
        """
        originals = {packet: packet.default for packet in self._operators}
        try:
            for packet, name in self._operators.items():
                packet.default = self._timed(packet.default, name)
            yield
        finally:
            for packet, original in originals.items():
                packet.default = original

    def _timed(self, operator: Callable[..., Any], name: str) -> Callable[..., Any]:
        nanoseconds = self._nanoseconds

        def call(*arguments: Any) -> Any:
            start = perf_counter_ns()
            result = operator(*arguments)
            nanoseconds[name] += perf_counter_ns() - start
            return result

        return call

    def __call__(self) -> dict[str, float]:
        """Return the seconds of each operator since the last call."""
        seconds = {name: value / 1e9 for name, value in self._nanoseconds.items()}
        self._nanoseconds.update(dict.fromkeys(self._nanoseconds, 0))
        return seconds
