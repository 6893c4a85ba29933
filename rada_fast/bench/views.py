"""Measure reading pictures and making their views, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rada_fast.bench.costs import Work
from rada_fast.bench.inputs import pictures
from rada_fast.bench.report import sizes_name
from rada_fast.bench.stages import Figure, Setting, Stage, measure
from rada_fast.config.bench import BenchViewsOptions
from rada_fast.config.commands import ViewKind
from rada_fast.data.decode import UnreadableImageError, pixels_of_picture
from rada_fast.data.sources import Sample
from rada_fast.data.views import Preprocess, ViewDataset, cut_views, image_seed, plan_views
from rada_fast.errors import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""The mean and the standard deviation of the channels in CLIP's own preprocessing."""


def figures(options: BenchViewsOptions) -> Iterator[list[Figure]]:
    """Yield the lines of figures of each kind and each number of views. Raises UserError if the data are unusable."""
    preprocess = Preprocess(options.image_size, MEAN, STD)
    seed = options.measuring.seed
    with pictures(options.data, options.pictures, image_size=options.image_size, seed=seed) as samples:
        for kind in options.view_kind:
            for views in options.views:
                setting = setting_of(samples, preprocess, views, kind, options)
                yield measure(setting, "cpu", options.measuring)


def setting_of(
    samples: Sequence[Sample], preprocess: Preprocess, views: int, kind: ViewKind, options: BenchViewsOptions
) -> Setting:
    """Return the setting of one kind and one number of views: reading, making the views, and both."""
    dataset = ViewDataset(samples, preprocess, views, kind, options.measuring.seed)
    sizes = {"pictures": len(samples), "views": views, "view_kind": kind}
    stages = stages_of(samples, preprocess, views, kind, options.measuring.seed)
    both = Stage(
        name="decode and views",
        inside="files to views, as the loops read them in one process",
        call=lambda: [dataset[index] for index in range(len(samples))],
        pictures=len(samples),
        work=tuple(work for stage in stages for work in stage.work),
    )
    return Setting(
        name=f"{sizes_name(sizes)}, {preprocess.image_size} pixels",
        sizes=sizes,
        stages=(*stages, both),
        whole="decode and views",
    )


def stages_of(
    samples: Sequence[Sample],
    preprocess: Preprocess,
    views: int,
    kind: ViewKind,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Stage, Stage]:
    """Return the stages of reading pictures and of making their views, each by itself.

    device: the device that cuts the views; their boxes are drawn on the CPU.

    Raises UserError if a picture cannot be read.
    """
    try:
        decoded = [(image_seed(seed, sample.id), pixels_of_picture(sample.path)) for sample in samples]
    except UnreadableImageError as error:
        raise UserError(f"data must be pictures that can be read: {error}") from None
    read = sum(pixels.numel() for _, pixels in decoded)
    written = len(samples) * views * 3 * preprocess.image_size**2 * torch.float32.itemsize

    def make() -> list[Tensor]:
        made = []
        for own, pixels in decoded:
            height, width, _ = pixels.shape
            plan = plan_views(height, width, preprocess, views, kind, own)
            made.append(cut_views(pixels.to(device), plan, preprocess))
        return made

    return (
        Stage(
            name="decode",
            inside="reading the files and decoding them to RGB pixels",
            call=lambda: [pixels_of_picture(sample.path) for sample in samples],
            pictures=len(samples),
            work=(Work(0, read),),
        ),
        Stage(
            name="views",
            inside="drawing the boxes of decoded pictures, cutting, resizing and normalising",
            call=make,
            pictures=len(samples),
            work=(Work(0, read + written),),
        ),
    )
