"""A trace of a few steps of a run by PyTorch's profiler, and a table of the operators that took most of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from rada_fast import _env
from rada_fast.runs.contents import TRACES
from rada_fast.system import files, notices, ranks

TRACE, TABLE = TRACES
WARM_UP, RECORDED = 3, 5
"""The steps before the trace, in which kernels are loaded and graphs recorded, and the steps in it."""
ROWS = 30
"""The number of operators in the table."""


@contextmanager
def profiled(wanted: bool, folder: Path, unit: str, prefix: str = "") -> Iterator[Callable[[], None]]:
    """Trace a few steps of what happens in the context, and write the trace and the table into a folder.

    The context gives a function to be called after every step. The run goes on as usual: with another speed during
    these steps, and with the same results. A run that ends early leaves a trace of the steps that it has taken.

    wanted: whether there shall be a trace at all. Of several ranks the first one makes it.
    folder: the folder of the run.
    unit: the word for a step, such as groups, for messages.
    prefix: the beginning of the names of the files.
    """
    if not wanted or not ranks.current().first:
        yield _nothing
        return
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps <= WARM_UP + RECORDED:
            profiler.step()
        if steps == WARM_UP + RECORDED:
            profiler.stop()

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _env.has_cuda() else [])]
    profiler = profile(
        activities=activities, record_shapes=True,
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=RECORDED, repeat=1),
        on_trace_ready=partial(_write, folder, prefix),
    )  # fmt: skip
    profiler.start()
    try:
        yield count
    finally:
        if steps < WARM_UP + RECORDED:
            profiler.stop()
            if steps <= WARM_UP:
                notices.warn(
                    f"profile: there is no trace, because the run had no more than {WARM_UP} {unit} to do, and the "
                    f"first {WARM_UP} only warm up"
                )


def _nothing() -> None:
    """Do nothing after a step that is not traced."""


def _write(folder: Path, prefix: str, profiler: Any) -> None:
    """Write the trace and the table. A run that cannot write them goes on."""
    by = "self_device_time_total" if _env.has_cuda() else "self_cpu_time_total"
    text = profiler.key_averages(group_by_input_shape=True).table(
        sort_by=by, row_limit=ROWS, max_name_column_width=60, max_shapes_column_width=60
    )
    try:
        files.write_by(folder / f"{prefix}{TRACE}", lambda path: _export(profiler, path))
        files.write_text(folder / f"{prefix}{TABLE}", text + "\n", encoding="utf-8")
    except OSError as error:
        notices.warn(f"profile: the trace cannot be written: {error}")
    else:
        notices.note(f"profile: {folder / (prefix + TABLE)} lists the operators, {prefix}{TRACE} is the trace")


def _export(profiler: Any, path: Path) -> None:
    """Write a compressed trace to a path of any ending. The profiler compresses only what ends in .gz."""
    compressed = path.with_name(f"{path.name}.gz")
    try:
        profiler.export_chrome_trace(str(compressed))
        compressed.replace(path)
    finally:
        compressed.unlink(missing_ok=True)
