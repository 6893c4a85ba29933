"""Measure the stages of a setting in turn, and compare each with what the machine can do.

The floor of a stage is the least time that the machine's measured limits allow: for each part of its work, the greater
of operations / product rate and bytes / bandwidth, because both can go on at once; the parts add up, because each needs
the result of the one before. A multiply-add is one, or two operations; every figure says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rada_fast.bench.costs import Work
from rada_fast.bench.timing import Call, Counter, Interleaved, Memory, Times, added, interleaved
from rada_fast.config.measuring import MeasuringOptions

Figure = dict[str, Any]
"""One line of figures, as figures_of describes it."""
MEMORY_LIMIT, CACHE_LIMIT = "bandwidth of memory", "bandwidth of caches"
"""The names of the limits for data that caches cannot, and can hold."""


class Part(NamedTuple):
    """A part of a stage whose time is counted while the stage runs.

    name: its name in the table.
    inside: what is counted, in words.
    work: the least work of one call by the formulas.
    """

    name: str
    inside: str
    work: tuple[Work, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the work of a setting that is timed by itself, or all of it.

    name: its name in the table.
    inside: what is inside of the timer, in words.
    call: does the work once, or None for a stage that consists of others.
    parts: the names of the other stages that it consists of; its times are the sums of theirs, round by round.
    pictures: the number of pictures of one call.
    work: the least work of one call by the formulas, part by part.
    operations: the operations of one call as PyTorch counts them, if it can; see counted_operations.
    within: whether it is a part of the whole, or the whole. Something that is only compared with it has no share.
    repeats: a call does the work so many times, and the times are those of one of them; work, operations and pictures
        too.
    counter: what counts the time of its parts while it runs; counted: these parts.
    rest: the part that has the time that no part has counted, if the parts never run at once.
    """

    name: str
    inside: str
    call: Call | None
    pictures: float
    parts: tuple[str, ...] = ()
    work: tuple[Work, ...] = ()
    operations: float | None = None
    within: bool = True
    repeats: int = 1
    counter: Counter | None = None
    counted: tuple[Part, ...] = ()
    rest: Part | None = None


class Ratio(NamedTuple):
    """The ratio of the time of a stage to that of another, or to the sum of several.

    name: its name in the table.
    stage, over: the names of the stages.
    inside: what it says, in words.
    """

    name: str
    stage: str
    over: tuple[str, ...]
    inside: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One set of sizes to measure.

    name: its name in the table.
    sizes: its sizes, by the names that all lines of figures have.
    stages: its stages, in the order of the work.
    whole: the name of the stage that contains the others; the share of a stage is of its time. None: there is none.
    ratios: the ratios to report.
    burst: the number of calls in a row in a round, or None for as many as take BURST_SECONDS.
    caches: whether the bytes of a work that caches can hold are compared with the bandwidth of caches, which is that of
        the fastest way through a buffer of no fewer bytes, and not with that of a copy in the main memory.
    refusals: the names of stages that cannot be measured here, and why.
    """

    name: str
    sizes: Mapping[str, Any]
    stages: tuple[Stage, ...]
    whole: str | None = None
    ratios: tuple[Ratio, ...] = ()
    burst: int | None = None
    caches: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)


class OperationCounter(TorchDispatchMode):
    """Count the operations of matrix products and attention by the formulas of torch.utils.flop_counter.

    PyTorch's own FlopCounterMode hooks all modules, and an adapter with hooks is computed in another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # In inference mode, an operation that consists of others arrives here as a whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.operations += formula(*args, **kwargs, out_val=out) if formula else 0
        return out


def counted_operations(call: Callable[[], Any]) -> float:
    """Return the operations of matrix products and attention in a call, as PyTorch's formulas count them.

    A multiply-add counts as two. PyTorch knows its own operations only, so the call must be plain PyTorch; tensors of
    the meta device will do.
    """
    # The counter knows neither the fast path of multi-head attention nor the fused attention of CPUs.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), OperationCounter() as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return float(counter.operations)


def relative_error(answer: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference of two tensors over the norm of the second one."""
    expected = expected.float()
    return float((answer.float() - expected).norm() / expected.norm())


def measure(setting: Setting, device: str, options: MeasuringOptions) -> list[Figure]:
    """Time the stages of a setting in turn, and return its lines of figures; see figures_of."""
    if not setting.stages:
        return refusal_figures(setting)
    dtypes = sorted({work.dtype for stage in setting.stages for work in stage.work if work.operations})
    measured = interleaved(
        {stage.name: stage.call for stage in setting.stages if stage.call is not None},
        device,
        seconds=options.seconds,
        repeats=options.repeats,
        dtypes=dtypes or ["float32"],
        burst=setting.burst,
        counters={stage.name: stage.counter for stage in setting.stages if stage.counter is not None},
        caches=setting.caches,
    )
    for stage in setting.stages:
        if stage.call is None:
            measured.times[stage.name] = added([measured.times[name] for name in stage.parts])
            measured.memory[stage.name] = None
        elif stage.repeats > 1:
            measured.times[stage.name] = divided(measured.times[stage.name], stage.repeats)
    parts = {
        (stage.name, part.name): divided(measured.parts[stage.name, part.name], stage.repeats)
        for stage in setting.stages
        for part in stage.counted
        if (stage.name, part.name) in measured.parts
    }
    return figures_of(setting, measured._replace(parts=parts))


def figures_of(setting: Setting, measured: Interleaved) -> list[Figure]:
    """Return the lines of figures of a setting: one for each stage, part, ratio and limit of the machine.

    Every line has the setting's name and sizes and:

    kind: "stage", "part", "ratio" or "limit", or "refusal" for a stage that cannot be measured here, and in
        bench/scaling.py "exponent"; name: that of the stage, the ratio or the limit, or those of a stage and of its
        part; inside: what was timed, or why nothing was.
    unit, best, median, spread, rounds: milliseconds of a stage; the ratio, from round to round; or what the machine can
        do. The best ratio is that of the best times. spread is how far the quartiles lie apart.
    share: the median of the stage over that of the whole, or of a part over that of its stage. Those that go on at once
        may have more than 1 together.
    pictures_per_second: by the median.
    multiply_adds_per_picture, operations_per_picture: by the formula, multiply-adds counted as one and as two.
    counted_multiply_adds_per_picture, counted_operations_per_picture: the same by PyTorch's counter.
    bytes_per_picture: what must at least be read and written.
    intensity: the operations by the formula over these bytes.
    floor_ms, gap: the least time that the machine's limits allow, with the fastest library's products, and the best
        time over it; share_of_floor: the floor over the best time.
    share_of_peak, share_of_bandwidth: the operations and the bytes per second of the best time over the machine's.
    peak_mib, extra_mib: the peak of memory during a call, and what of it was not in use before.

    What does not apply is None.
    """
    medians = {name: times.median for name, times in measured.times.items()}
    lines = []
    for stage in setting.stages:
        share = medians[stage.name] / medians[setting.whole] if setting.whole and stage.within else None
        lines += [stage_figure(setting, stage, measured, share=share), *part_figures(setting, stage, measured)]
    lines += refusal_figures(setting)
    for ratio in setting.ratios:
        own, others = measured.times[ratio.stage], [measured.times[name] for name in ratio.over]
        times, best = own.over(others), own.best / sum(other.best for other in others)
        lines.append(
            line_of(
                setting, kind="ratio", name=ratio.name, inside=ratio.inside, unit="1", best=best,
                median=times.median, spread=times.spread, rounds=len(times.rounds),
            )
        )  # fmt: skip
    for (dtype, library), rate in measured.product_rates.items():
        inside = f"{library}'s product of two large matrices, the best of all rounds; a multiply-add counts as two"
        name = f"{dtype} products by {library}"
        lines.append(line_of(setting, kind="limit", name=name, inside=inside, unit="GFLOP/s", best=rate / 1e9))
    inside = "PyTorch's copy of a large buffer, the best of all rounds; bytes read and bytes written"
    best = measured.bandwidth / 1e9
    lines.append(line_of(setting, kind="limit", name="bandwidth", inside=inside, unit="GB/s", best=best))
    if measured.passes:
        inside = "reading, changing or copying {} in PyTorch, the fastest of all rounds; bytes read and bytes written"
        for name, buffer, moved in (
            (MEMORY_LIMIT, "a large buffer", max(measured.passes) / 2),
            (CACHE_LIMIT, "smaller buffers", 0),
        ):
            best = measured.bandwidth_of(moved) / 1e9
            text = inside.format(buffer)
            lines.append(line_of(setting, kind="limit", name=name, inside=text, unit="GB/s", best=best))
    return lines


def refusal_figures(setting: Setting) -> list[Figure]:
    """Return the lines of the stages that cannot be measured."""
    return [line_of(setting, kind="refusal", name=name, inside=reason) for name, reason in setting.refusals.items()]


def stage_figure(setting: Setting, stage: Stage, measured: Interleaved, *, share: float | None) -> Figure:
    """Return the line of figures of one stage."""
    times: Times = measured.times[stage.name]
    memory: Memory | None = measured.memory[stage.name]
    operations, counted = sum(work.operations for work in stage.work), stage.operations
    return line_of(
        setting,
        kind="stage",
        name=stage.name,
        inside=stage.inside,
        unit="ms",
        best=times.best,
        median=times.median,
        spread=times.spread,
        rounds=len(times.rounds),
        share=share,
        pictures_per_second=1e3 * stage.pictures / times.median,
        multiply_adds_per_picture=operations / 2 / stage.pictures if operations else None,
        operations_per_picture=operations / stage.pictures if operations else None,
        counted_multiply_adds_per_picture=counted / 2 / stage.pictures if counted is not None else None,
        counted_operations_per_picture=counted / stage.pictures if counted is not None else None,
        peak_mib=None if memory is None else memory.peak_mib,
        extra_mib=None if memory is None else memory.extra_mib,
        **least_figures(stage.work, stage.pictures, times, measured),
    )


def part_figures(setting: Setting, stage: Stage, measured: Interleaved) -> list[Figure]:
    """Return the lines of figures of the parts of a stage that were at work at all."""
    whole = measured.times[stage.name]
    found = [
        (part, measured.parts[stage.name, part.name])
        for part in stage.counted
        if (stage.name, part.name) in measured.parts
    ]
    if found and stage.rest is not None:
        sums = added([times for _, times in found]).rounds
        found.append((stage.rest, Times(tuple(all_of - own for all_of, own in zip(whole.rounds, sums, strict=True)))))
    lines = []
    for part, times in found:
        if times.median == 0:
            continue
        operations = sum(work.operations for work in part.work)
        lines.append(
            line_of(
                setting, kind="part", name=f"{stage.name}: {part.name}", inside=part.inside, unit="ms", best=times.best,
                median=times.median, spread=times.spread, rounds=len(times.rounds), share=times.median / whole.median,
                multiply_adds_per_picture=operations / 2 / stage.pictures if operations else None,
                operations_per_picture=operations / stage.pictures if operations else None,
                **least_figures(part.work, stage.pictures, times, measured),
            )
        )  # fmt: skip
    return lines


def least_figures(works: Sequence[Work], pictures: float, times: Times, measured: Interleaved) -> Figure:
    """Return the figures that compare times with the least that the machine's limits allow."""
    moved = sum(work.bytes for work in works)
    products = [1e3 * work.operations / measured.product_rate(work.dtype) if work.operations else 0.0 for work in works]
    copies = [1e3 * work.bytes / measured.bandwidth_of(work.bytes) for work in works]
    floor = sum(map(max, products, copies))
    return {
        "bytes_per_picture": moved / pictures if moved else None,
        "intensity": sum(work.operations for work in works) / moved if any(products) and moved else None,
        "floor_ms": floor or None,
        "gap": times.best / floor if floor else None,
        "share_of_floor": floor / times.best if floor else None,
        "share_of_peak": sum(products) / times.best if any(products) else None,
        "share_of_bandwidth": sum(copies) / times.best if moved else None,
    }


def divided(times: Times, by: int) -> Times:
    """Return the times divided by a number."""
    return Times(tuple(one / by for one in times.rounds))


MEASURED = (
    "kind", "name", "inside", "unit", "best", "median", "spread", "rounds", "share", "pictures_per_second",
    "multiply_adds_per_picture", "operations_per_picture", "counted_multiply_adds_per_picture",
    "counted_operations_per_picture", "bytes_per_picture", "intensity", "floor_ms", "gap", "share_of_floor",
    "share_of_peak", "share_of_bandwidth", "peak_mib", "extra_mib",
)  # fmt: skip
"""What every line of figures has besides the setting."""
SIZES = (
    "model", "pretrained", "precision", "batch", "episodes", "pictures", "views", "view_kind", "image_size", "steps",
    "classes", "embed_dim",
)  # fmt: skip
"""The sizes that every line of figures has; what does not apply is None."""


def line_of(setting: Setting, **values: Any) -> Figure:
    """Return a line of figures with these values, and None for those that are not given."""
    assert set(values) <= set(MEASURED)
    assert set(setting.sizes) <= set(SIZES)
    sizes = {name: setting.sizes.get(name) for name in SIZES}
    return {"setting": setting.name, **sizes, **{name: values.get(name) for name in MEASURED}}
