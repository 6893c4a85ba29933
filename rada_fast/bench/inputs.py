"""Make the inputs of measurements where no data are at hand: drawn pictures as JPEG files, and random features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.data.open import open_source
from rada_fast.data.sources import Sample
from rada_fast.embedded import world
from rada_fast.errors import UserError

PHOTO_SIZE = (500, 375)
"""The width and the height of most photographs of ImageNet, in pixels."""


@contextmanager
def pictures(data: str | None, count: int, *, image_size: int, seed: int) -> Iterator[list[Sample]]:
    """Open the image files to measure with; drawn ones lie in a temporary folder while the context lasts.

    data: KIND:PATH of image files, or None for drawn pictures of the embedded world as JPEG files. For models with
        larger images than the embedded one they are enlarged to the size of photographs.
    count: the number of pictures. Data with fewer of them are repeated.
    image_size: the side of the model's images.
    seed: the seed of the drawn pictures.

    Raises UserError if the data cannot be used.
    """
    if data is not None:
        try:
            source = open_source(data)
        except UserError as error:
            raise UserError(f"data {data}: {error}") from None
        if not source.holds_images or not source.samples:
            raise UserError(f"data must be image files, imagefolder:DIR or images:DIR, got {data}")
        samples = source.limited(count).samples
        yield [samples[index % len(samples)] for index in range(count)]
        return
    size = (world.PICTURE_SIZE, world.PICTURE_SIZE) if image_size <= world.IMAGE_SIZE else PHOTO_SIZE
    with TemporaryDirectory(prefix="rada-fast-bench-") as folder:
        found = []
        for index in range(count):
            label = index % len(world.class_names())
            drawn = Image.fromarray(world.class_image(label, seed + index // len(world.class_names()), "mixed"))
            path = Path(folder) / f"{index:05d}.jpg"
            drawn.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
            found.append(Sample(path.name, path, label))
        yield found


def unit_rows(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw random vectors of length 1, as the features of images and texts are. Returns shape, float32."""
    return normalize(torch.randn(*shape), dim=-1).to(device)
