"""Views of one image: the original, random crops, and AugMix. All draws depend on the seed and the image's id alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rada_fast.config.commands import ViewKind
from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.sources import Sample
from rada_fast.ops import CROP_SCALE as CROP_SCALE
from rada_fast.ops import augmix, multi_view_crops, random_augmix, random_views, whole_view

AUGMIX_CHAINS, AUGMIX_DEPTH, AUGMIX_SEVERITY = 3, 3, 1.0
"""AugMix as test-time prompt tuning uses it: three chains of one to three operations at the lowest severity."""


@dataclass(frozen=True)
class Preprocess:
    """The form in which a model expects its images.

    image_size: the side S in pixels.
    mean, std: the mean and the standard deviation of each channel, for values in 0..1.
    interpolation: the filter that resizes the original.
    resize: "shortest" resizes the shorter side to S and cuts out the centre; "squash" resizes both sides to S, as
        SigLIP and some other models expect.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"


def image_seed(seed: int, image_id: str) -> int:
    """Return a 63-bit seed that depends on the two arguments alone."""
    digest = hashlib.sha256(os.fsencode(f"{seed} {image_id}")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def center_view(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """Prepare the original as open_clip's evaluation transform does: resized, cut to its centre, normalised.

    image: RGB, as read_image returns it. Returns (3, S, S) float32.
    """
    return _cut(image, preprocess, _original(image, preprocess))[0]


def make_views(
    image: Image.Image,
    preprocess: Preprocess,
    num_views: int,
    kind: ViewKind,
    seed: int,
) -> Tensor:
    """Make the original and num_views - 1 random views of an image.

    Boxes and flips are those that torchvision's RandomResizedCrop (bilinear) and RandomHorizontalFlip draw after
    torch.manual_seed(seed); AugMix draws from the same stream. The global random state does not change.

    image: RGB, as read_image returns it. Returns (V, 3, S, S) float32. Raises ValueError where num_views is below 1 or
    the kind is unknown.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    if kind not in ("crop", "augmix"):
        raise ValueError(f"kind must be crop or augmix, got {kind!r}")
    size, original = preprocess.image_size, _original(image, preprocess)
    if kind == "crop":
        drawn = random_views(image.height, image.width, size, num_views - 1, _generator(seed))
        return _cut(image, preprocess, torch.cat([original, drawn]))
    plan = random_augmix(
        image.height,
        image.width,
        size,
        num_views - 1,
        _generator(seed),
        chains=AUGMIX_CHAINS,
        depth=AUGMIX_DEPTH,
        severity=AUGMIX_SEVERITY,
    ).with_plain(original)
    return augmix([_pixels(image)], plan, size, preprocess.mean, preprocess.std)


def crop_view(image: Image.Image, preprocess: Preprocess, seed: int, crop_scale: tuple[float, float]) -> Tensor:
    """Make one random crop with a random flip, for training.

    image: RGB, as read_image returns it; crop_scale: the least and the largest share of the image. Returns (3, S, S)
    float32.
    """
    view = random_views(image.height, image.width, preprocess.image_size, 1, _generator(seed), scale=crop_scale)
    return _cut(image, preprocess, view)[0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(image: Image.Image) -> Tensor:
    """Return the pixels, (height, width, 3) uint8."""
    return torch.from_numpy(np.array(image))


def _original(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """Return the view of the original, a table with one row."""
    return whole_view(
        image.height,
        image.width,
        preprocess.image_size,
        resize=preprocess.resize,
        interpolation=preprocess.interpolation,
    )


def _cut(image: Image.Image, preprocess: Preprocess, views: Tensor) -> Tensor:
    """Cut a table of views out of an image. Returns (V, 3, S, S) float32."""
    return multi_view_crops([_pixels(image)], views, preprocess.image_size, preprocess.mean, preprocess.std)


class Item(NamedTuple):
    """The views of one image of a data set, or the reason why it has none.

    number: the number of the sample, counted from 0.
    views: (V, 3, S, S) float32, or None if the image cannot be read.
    reason: the reason why it cannot be read, or None.
    """

    number: int
    views: Tensor | None
    reason: str | None


Anything = TypeVar("Anything")


class ViewDataset(Dataset[Item]):
    """The views of image files, one Item for each; an unreadable file has a reason instead of views.

    samples: the image files.
    preprocess: the form of the views.
    num_views: the number V of views, the original first, or 0 for one random training crop (1, 3, S, S).
    kind: see make_views.
    seed: the seed of the data set. The seed of an image is image_seed(seed, id).
    crop_scale: the smallest and the largest share of the image in a training crop.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        num_views: int,
        kind: ViewKind,
        seed: int,
        crop_scale: tuple[float, float] = CROP_SCALE,
    ) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.num_views = num_views
        self.kind: ViewKind = kind
        self.seed = seed
        self.crop_scale = crop_scale

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        try:
            image = read_image(sample.path)
        except UnreadableImageError as error:
            return Item(index, None, str(error))
        seed = image_seed(self.seed, sample.id)
        if self.num_views == 0:
            return Item(index, crop_view(image, self.preprocess, seed, self.crop_scale)[None], None)
        return Item(index, make_views(image, self.preprocess, self.num_views, self.kind, seed), None)


def collate_single(item: Anything) -> Anything:
    """Return the item itself. This is the collate function of a loader whose items do not form batches."""
    return item
