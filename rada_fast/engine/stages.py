"""The time for which each stage of a pipeline was at work, counted while several threads run the stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

TTT_STAGES = ("decode", "views", "encode", "select", "adapt", "predict", "record")
"""The stages of test-time training: a picture is decoded, its views are cut and encoded, the confident ones are
selected, the adapter takes its steps on them, the original view is predicted, and the result is recorded. On a GPU,
selection and prediction count as parts of adapt, because all three are one recorded graph."""

Busy = Callable[[str], AbstractContextManager[None]]
"""A function from the name of a stage to a context, whose time is that of the stage; see StageTimes.busy."""


def uncounted(stage: str) -> AbstractContextManager[None]:
    """Return a context that counts no time."""
    return nullcontext()


class StageTimes:
    """Count the seconds for which each stage was busy, in whichever thread it ran.

    Stages that run at the same time in several threads may together be busy for longer than the clock ran.

    stages: the names of the stages, in the order in which a picture passes through them.
    """

    def __init__(self, stages: Sequence[str] = TTT_STAGES) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(stages, 0.0)

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Count the time until the end of the context for a stage, also if the context ends with an exception."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere, such as by the events of a GPU. Raises KeyError for other names.

        stage: the name of the stage.
        seconds: the time for which it was busy.
        """
        with self._lock:
            self._seconds[stage] += seconds

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage so far, in the order of the stages."""
        with self._lock:
            return dict(self._seconds)
