"""Measure how time and memory grow with the number of classes, images and episodes, and fit exponents.

One number grows at a time. A call that would probably take too much memory or time, as its smaller sizes tell, is not
made, and a line of figures says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rada_fast import _env
from rada_fast.bench import costs
from rada_fast.bench.adapter import BASELINE, Problem, call_of, work_of
from rada_fast.bench.costs import Work
from rada_fast.bench.inputs import unit_rows
from rada_fast.bench.partial import PartialFigures, measured_in_turn
from rada_fast.bench.report import COLUMNS, Presentation, picture_title, sizes_name
from rada_fast.bench.stages import Figure, Setting, Stage, line_of, measure
from rada_fast.bench.timing import Call
from rada_fast.config.bench_limits import BenchScalingOptions, ScalingAxis
from rada_fast.config.checks import bytes_of
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine.episodes import adapt_episodes
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter
from rada_fast.ops import use_backend
from rada_fast.system.memory import free_unused, is_lack_of_memory

GROWTH: Mapping[ScalingAxis, float] = {"classes": 2.0, "batch": 1.0, "episodes": 1.0}
"""The power with which time and memory grow at the most, by the number that grows."""
LETTERS: Mapping[ScalingAxis, str] = {"classes": "K", "batch": "B", "episodes": "E"}
UPPER_RANGE, LEAST_SIZES = 10, 3
"""Exponents are fitted to the sizes of at least a tenth of the largest one, and to no fewer than three."""
SHARE_OF_MEMORY = 0.75
"""This share of the memory that is available may be taken, where the options do not say how much."""
SLOW_SETTING = 20.0
"""If one round of a setting takes more seconds, there is only one."""
QUANTITIES = {"time": "best", "memory": "extra_mib"}
"""What grows, and the entry of a line of figures that has it."""


class Growing(NamedTuple):
    """A stage at one size, before its inputs are drawn.

    name: its name, the same at all sizes; inside: what is timed; pictures: the images of one call.
    work: the least work of a call, part by part; make: draws the inputs and returns the call.
    """

    name: str
    inside: str
    pictures: int
    work: tuple[Work, ...]
    make: Callable[[], Call]


class Limits(NamedTuple):
    """The most that a call may take: MiB of memory beyond what was in use before, and seconds."""

    mib: float
    seconds: float


class Known(NamedTuple):
    """What is known of the smaller sizes of a stage: the last size with its milliseconds and its MiB."""

    size: int
    ms: float
    mib: float


def figures(
    options: BenchScalingOptions, device: torch.device, partial_figures: PartialFigures
) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each size, and at the end those of the fitted exponents."""
    memory = available_memory(device) if options.memory is None else bytes_of("memory", options.memory)
    limits = Limits(memory * (1.0 if options.memory else SHARE_OF_MEMORY) / 2**20, options.longest)
    known: dict[tuple[str, str], Known] = {}
    settings = {
        setting_name(axis, sizes_of(axis, size, options)): partial(measured, axis, size, known, limits, options, device)
        for axis in options.axes
        for size in sorted(getattr(options, axis))
        if next(growing_stages(axis, size, options, device), None) is not None
    }
    if not settings:
        raise UserError(
            f"axes {' '.join(options.axes)} leave nothing to measure with passes {' '.join(options.passes)} and "
            f"providers {' '.join(options.providers)}: classes grow in every pass, batch in forward and step, and "
            "episodes in episode, which literal does not have"
        )
    found: list[Figure] = []
    for lines in measured_in_turn("bench scaling", settings, partial_figures):
        for line in lines:
            if line["kind"] == "stage":
                axis = axis_of(line)
                known[axis, line["name"]] = Known(line[axis], line["best"], line["extra_mib"] or 0.0)
        found += lines
        yield lines
    exponents = exponent_figures(found)
    if exponents:
        yield exponents


def available_memory(device: torch.device) -> int:
    """Return the bytes of memory that are available on the device."""
    return _env.available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def sizes_of(axis: ScalingAxis, size: int, options: BenchScalingOptions) -> dict[str, Any]:
    """Return the sizes of a setting: the number that grows, and those that stay."""
    sizes: dict[str, Any] = {"batch": 1, "classes": options.common_classes, axis: size}
    if axis == "episodes":
        del sizes["batch"]
    if "episode" in options.passes and axis != "batch":
        sizes |= {"views": options.views, "steps": options.steps}
    return sizes | {"embed_dim": options.embed_dim, "precision": options.precision}


def setting_name(axis: ScalingAxis, sizes: Mapping[str, Any]) -> str:
    """Return the name of a setting, which begins with the number that grows."""
    return f"over {axis}, {sizes_name(dict(sizes))}"


def axis_of(figure: Figure) -> ScalingAxis:
    """Return which number grows in a line of figures."""
    axis: ScalingAxis = figure["setting"].partition(", ")[0].removeprefix("over ")
    return axis


def measured(
    axis: ScalingAxis,
    size: int,
    known: Mapping[tuple[str, str], Known],
    limits: Limits,
    options: BenchScalingOptions,
    device: torch.device,
) -> list[Figure]:
    """Measure all stages of one size that stay within the limits, and return their lines of figures."""
    stages: list[Stage] = []
    refusals: dict[str, str] = {}
    seconds = 0.0
    for growing in growing_stages(axis, size, options, device):
        expected = expected_at(size, known.get((axis, growing.name)), GROWTH[axis])
        reason = refusal(expected, limits)
        if reason is not None:
            refusals[growing.name] = reason
            continue
        seconds += 1e-3 * expected.ms
        stages.append(
            Stage(
                name=growing.name, inside=growing.inside, call=growing.make(), pictures=growing.pictures,
                work=growing.work,
            )
        )  # fmt: skip
    sizes = sizes_of(axis, size, options)
    setting = Setting(name=setting_name(axis, sizes), sizes=sizes, stages=tuple(stages), refusals=refusals)
    measuring = options.measuring
    if seconds > SLOW_SETTING and measuring.repeats is None:
        measuring = dataclasses.replace(measuring, repeats=1)
    try:
        return measure(setting, device.type, measuring)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    return measure(with_room(setting), device.type, measuring)


def with_room(setting: Setting) -> Setting:
    """Try each stage of a setting by itself, and leave out those that run out of memory."""
    kept, refusals = [], dict(setting.refusals)
    for stage in setting.stages:
        assert stage.call is not None
        free_unused()
        try:
            stage.call()
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            refusals[stage.name] = "memory is exhausted"
        else:
            kept.append(stage)
    return dataclasses.replace(setting, stages=tuple(kept), refusals=refusals)


def expected_at(size: int, known: Known | None, power: float) -> Known:
    """Return what a stage takes at a size if it grows with a power, or nothing if no smaller size is known."""
    if known is None:
        return Known(size, 0.0, 0.0)
    factor = (size / known.size) ** power
    return Known(size, factor * known.ms, factor * known.mib)


def refusal(expected: Known, limits: Limits) -> str | None:
    """Return why a call is not made, or None if it stays within the limits."""
    if expected.mib > limits.mib:
        return f"it would take about {expected.mib / 1024:.3g} GiB, and {limits.mib / 1024:.3g} GiB are allowed"
    if expected.ms > 1e3 * limits.seconds:
        return f"a call would take about {expected.ms / 1e3:.0f} s, and {limits.seconds:.0f} s are allowed"
    return None


def growing_stages(
    axis: ScalingAxis, size: int, options: BenchScalingOptions, device: torch.device
) -> Iterator[Growing]:
    """Yield the stages of one size."""
    sizes = sizes_of(axis, size, options)
    for provider in options.providers:
        backend = provider if provider != "rada_fast" else "cpu" if device.type == "cpu" else "triton"
        for one in options.passes:
            if one == "episode":
                if axis != "batch" and provider != BASELINE:
                    yield episodes(backend, provider, sizes.get("episodes", 1), sizes["classes"], options, device)
            elif axis != "episodes":
                problem = Problem(
                    sizes["batch"], sizes["classes"], options.preset, options.precision, one == "step",
                    options.embed_dim, device.type,
                )  # fmt: skip
                inside = f"{'forward and backward' if one == 'step' else 'forward'}, by the backend {backend}"
                yield Growing(
                    f"{provider} {one}", inside, problem.batch, (work_of(problem, backend),),
                    partial(call_of, problem, backend),
                )  # fmt: skip


def episodes(
    backend: str, provider: str, count: int, classes: int, options: BenchScalingOptions, device: torch.device
) -> Growing:
    """Return the stage of test-time training for several pictures, from the features of their views to predictions."""
    config = dataclasses.replace(EpisodeConfig(), steps=options.steps)
    make_config = AdapterConfig.official if options.preset == "official" else AdapterConfig.paper
    adapter_config = make_config(options.embed_dim)
    selected = config.num_selected(options.views)
    each = costs.episode_work(adapter_config, options.views, selected, options.steps, classes)

    def make() -> Call:
        torch.manual_seed(0)
        dtype = getattr(torch, options.precision)
        adapter = RationalAdapter(adapter_config).to(device)
        views = unit_rows(count, options.views, options.embed_dim).to(device, dtype)
        text = unit_rows(classes, options.embed_dim).to(device, dtype)

        def call() -> Any:
            with use_backend(backend):
                return adapt_episodes(adapter, views, text, 100.0, config)

        return call

    inside = f"features of {options.views} views to predictions in {options.steps} steps, by the backend {backend}"
    return Growing(f"{provider} episode", inside, count, each * count, make)


def fitted(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, int] | None:
    """Fit value = c size^p to the upper range by least squares of logarithms. Returns p and the number of sizes used.

    sizes: in ascending order. Values that are not positive are left out. With fewer than three sizes nothing is fitted.
    """
    pairs = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0]
    upper = [pair for pair in pairs if pair[0] >= pairs[-1][0] / UPPER_RANGE]
    used = upper if len(upper) >= LEAST_SIZES else pairs[-LEAST_SIZES:]
    if len(used) < LEAST_SIZES:
        return None
    across, along = ([math.log(pair[at]) for pair in used] for at in (0, 1))
    middle, mean = sum(across) / len(used), sum(along) / len(used)
    spread = sum((x - middle) ** 2 for x in across)
    return sum((x - middle) * (y - mean) for x, y in zip(across, along, strict=True)) / spread, len(used)


def exponent_figures(lines: Sequence[Figure]) -> list[Figure]:
    """Return a line of figures for each exponent, which has the kind "exponent"."""
    found = []
    for (axis, name), own in series_of(lines).items():
        for quantity, key in QUANTITIES.items():
            points = [(line[axis], line[key]) for line in own if line[key] is not None]
            fit = fitted([size for size, _ in points], [value for _, value in points])
            if fit is None:
                continue
            power, count = fit
            positive = [size for size, value in points if value > 0]
            setting = Setting(name="exponents", sizes={}, stages=())
            inside = (
                f"{quantity} grows with {LETTERS[axis]}^{power:.2f} for {LETTERS[axis]} from {positive[-count]} to "
                f"{positive[-1]}: least squares of the logarithms at {count} sizes"
            )
            label = f"{name}, {quantity} over {axis}"
            found.append(line_of(setting, kind="exponent", name=label, inside=inside, unit="1", best=power))
    return found


def series_of(lines: Sequence[Figure]) -> dict[tuple[ScalingAxis, str], list[Figure]]:
    """Return the lines of each stage in the order of its sizes, by the number that grows and the stage's name."""
    series: dict[tuple[ScalingAxis, str], list[Figure]] = {}
    for line in lines:
        if line["kind"] == "stage":
            series.setdefault((axis_of(line), line["name"]), []).append(line)
    return {key: sorted(own, key=lambda line: line[key[0]]) for key, own in series.items()}


def draw(path: Path, part: str, figures: Sequence[Figure], facts: dict[str, Any]) -> None:
    """Draw time and memory over each number that grows."""
    from rada_fast.reports.charts import GrowthPanel, GrowthSeries, growth_chart

    exponents = {line["name"]: line["best"] for line in figures if line["kind"] == "exponent"}
    series = series_of(figures)
    axes = list(dict.fromkeys(axis for axis, _ in series))
    labels = {"time": "best time of a call, ms", "memory": "peak memory beyond what was in use before, MiB"}
    panels = []
    for quantity, key in QUANTITIES.items():
        for axis in axes:
            lines = [
                GrowthSeries(
                    *provider_and_pass(name), [line[axis] for line in own], [line[key] or 0.0 for line in own],
                    exponents.get(f"{name}, {quantity} over {axis}"),
                )
                for (own_axis, name), own in series.items()
                if own_axis == axis
            ]  # fmt: skip
            example = next(line for line in figures if line["kind"] == "stage" and axis_of(line) == axis)
            fixed = [
                f"{letter} {example[name]}"
                for name, letter in (("batch", "B"), ("classes", "K"), ("views", "V"), ("embed_dim", "D"))
                if name != axis and example[name] is not None
            ]
            panels.append(GrowthPanel(f"{axis} {LETTERS[axis]} ({', '.join(fixed)})", labels[quantity], lines))
    refused = dict.fromkeys(
        f"{line['name']} at {LETTERS[axis_of(line)]} {line[axis_of(line)]}: {line['inside']}"
        for line in figures
        if line["kind"] == "refusal"
    )
    dtype = next(line["precision"] for line in figures if line["kind"] == "stage")
    growth_chart(path, title=f"{picture_title(part, facts)}, {dtype}", columns=len(axes), panels=panels,
                 notes=first_refusals(refused))  # fmt: skip


def provider_and_pass(name: str) -> tuple[str, str]:
    """Return the two parts of the name of a stage."""
    provider, _, one = name.partition(" ")
    return provider, one


def first_refusals(refusals: Sequence[str] | Mapping[str, None]) -> list[str]:
    """Return the first refusal of each stage; the larger sizes follow from it."""
    first: dict[str, str] = {}
    for text in refusals:
        first.setdefault(text.partition(" at ")[0] + text.partition(" at ")[2][:1], text)
    return [f"not measured from here on: {text}" for text in first.values()]


SHOWN = ("stage", "best ms", "median", "spread", "pictures/s", "floor ms", "gap", "peak MiB")
PRESENTATION = Presentation(
    {
        **{name: column for name, column in COLUMNS.items() if name in SHOWN},
        "extra MiB": lambda figure: "" if figure["extra_mib"] is None else f"{figure['extra_mib']:.1f}",
    },
    "floor: operations / product rate or bytes / bandwidth, whichever is more, part by part; gap: best / floor; peak "
    "MiB: of the process, or of the device's tensors; extra MiB: what of it was not in use before the call",
    draw,
)
