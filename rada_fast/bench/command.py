"""The command `bench`: it measures what its configuration names, and shows the figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from rada_fast.bench import adapter, encoder, rivals, roofline, scaling, table5, training, ttt, views
from rada_fast.bench.partial import partial_figures
from rada_fast.bench.report import machine_facts, output_files, show
from rada_fast.bench.stages import Figure
from rada_fast.config.bench import (
    PARTS,
    BenchAdapterOptions,
    BenchEFTOptions,
    BenchEncoderOptions,
    BenchFFTOptions,
    BenchOptions,
    BenchRivalsOptions,
    BenchTable5Options,
    BenchTTTOptions,
    BenchViewsOptions,
)
from rada_fast.config.bench_limits import BenchRooflineOptions, BenchScalingOptions
from rada_fast.models.vision_language import resolve_device
from rada_fast.system import notices


def run_bench(options: BenchOptions) -> int:
    """Measure, print the figures, and write the files that the options ask for. Returns the exit status.

    Raises UserError naming an option that cannot be used.
    """
    device = device_of(options)
    notices.release()
    # Everything is measured on the current device.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.random.fork_rng(devices=[]):
        seed = options.seed if isinstance(options, BenchRivalsOptions) else options.measuring.seed
        torch.default_generator.manual_seed(seed)
        # Methods that are compared with one another have a table of their own.
        if isinstance(options, BenchRivalsOptions):
            return rivals.run_rivals(options, device)
        if isinstance(options, BenchTable5Options):
            return table5.run_table5(options, device)
        part = next(name for name, kind in PARTS.items() if isinstance(options, kind))
        if isinstance(options, BenchRooflineOptions | BenchScalingOptions):
            return run_long(part, options, device)
        return show(part, measured(options, device), machine_facts(device), options.measuring)


def run_long(part: str, options: BenchRooflineOptions | BenchScalingOptions, device: torch.device) -> int:
    """Measure something that takes minutes; an interrupted run goes on. Returns the exit status."""
    facts = machine_facts(device)
    file = None if options.measuring.output is None else output_files(options.measuring.output, part)[1]
    partial = partial_figures(file, options, facts)
    if isinstance(options, BenchRooflineOptions):
        settings, presentation = roofline.figures(options, device, partial), roofline.PRESENTATION
    else:
        settings, presentation = scaling.figures(options, device, partial), scaling.PRESENTATION
    status = show(part, settings, facts, options.measuring, presentation)
    partial.finish()
    return status


def device_of(options: BenchOptions) -> torch.device:
    """Return the device that the options name; views are made on the CPU."""
    if isinstance(options, BenchViewsOptions):
        return torch.device("cpu")
    if isinstance(options, BenchAdapterOptions | BenchRooflineOptions | BenchScalingOptions):
        return resolve_device(options.device)
    return resolve_device(options.model.device)


def measured(options: BenchOptions, device: torch.device) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each setting of a configuration as soon as it is measured."""
    match options:
        case BenchTTTOptions():
            return ttt.figures(options, device)
        case BenchEFTOptions():
            return training.eft_figures(options, device)
        case BenchFFTOptions():
            return training.fft_figures(options, device)
        case BenchEncoderOptions():
            return encoder.figures(options, device)
        case BenchViewsOptions():
            return views.figures(options)
        case BenchAdapterOptions():
            return adapter.figures(options, device)
    raise AssertionError(f"no part of the command has the options {options!r}")
