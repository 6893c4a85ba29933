"""Views of one image: the original, random crops, and AugMix. All draws depend on the seed and the image's id alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rada_fast.config.commands import ViewKind
from rada_fast.data.decode import UnreadableImageError, pixels_of, read_image
from rada_fast.data.sources import Sample
from rada_fast.ops import CROP_SCALE as CROP_SCALE
from rada_fast.ops import AugmixPlan, augmix, multi_view_crops, random_augmix, random_views, whole_view

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
    resized: the length to which a side is resized instead of S, before the centre is cut out; None stands for S. ALIGN
        expects a picture of 346 x 346 pixels, of which it sees the inner 289 x 289.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    resized: int | None = None

    def whole_view(self, height: int, width: int) -> Tensor:
        """Return the view (1, 11) of the original of this size; see ops.whole_view."""
        return whole_view(
            height, width, self.image_size,
            resize=self.resize, interpolation=self.interpolation, resized=self.resized,
        )  # fmt: skip


def image_seed(seed: int, image_id: str) -> int:
    """Return a 63-bit seed that depends on the two arguments alone."""
    digest = hashlib.sha256(os.fsencode(f"{seed} {image_id}")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def center_view(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """Prepare the original as open_clip's evaluation transform does: resized, cut to its centre, normalised.

    image: RGB, as read_image returns it. Returns (3, S, S) float32.
    """
    return cut_views(pixels_of(image), preprocess.whole_view(image.height, image.width), preprocess)[0]


ViewPlan = Tensor | AugmixPlan
"""The boxes of the views of one picture, and for AugMix what is done with each."""


def plan_views(height: int, width: int, preprocess: Preprocess, num_views: int, kind: ViewKind, seed: int) -> ViewPlan:
    """Draw the boxes of the original and of num_views - 1 random views of a picture.

    Boxes and flips are those that torchvision's RandomResizedCrop (bilinear) and RandomHorizontalFlip draw after
    torch.manual_seed(seed); AugMix draws from the same stream. The global random state does not change.

    height, width: the size of the picture, in pixels.
    preprocess: the form of the views.
    num_views: the number V of views.
    kind: "crop" or "augmix".
    seed: decides the draws, with the size of the picture.

    Raises ValueError where num_views is below 1 or the kind is unknown.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    if kind not in ("crop", "augmix"):
        raise ValueError(f"kind must be crop or augmix, got {kind!r}")
    size, generator = preprocess.image_size, _generator(seed)
    original = preprocess.whole_view(height, width)
    if kind == "crop":
        return torch.cat([original, random_views(height, width, size, num_views - 1, generator)])
    return random_augmix(
        height, width, size, num_views - 1, generator,
        chains=AUGMIX_CHAINS, depth=AUGMIX_DEPTH, severity=AUGMIX_SEVERITY,
    ).with_plain(original)  # fmt: skip


def cut_views(pixels: Tensor, plan: ViewPlan, preprocess: Preprocess) -> Tensor:
    """Cut the views of a plan out of a picture, on the device of its pixels. Returns (V, 3, S, S) float32.

    pixels: (height, width, 3) uint8, RGB.
    plan: the result of plan_views for the picture's size.
    preprocess: the form of the views.
    """
    form = (preprocess.image_size, preprocess.mean, preprocess.std)
    if isinstance(plan, AugmixPlan):
        return augmix([pixels], plan, *form)
    return multi_view_crops([pixels], plan, *form)


def make_views(
    image: Image.Image,
    preprocess: Preprocess,
    num_views: int,
    kind: ViewKind,
    seed: int,
) -> Tensor:
    """Make the original and num_views - 1 random views of an image; see plan_views.

    image: RGB, as read_image returns it. Returns (V, 3, S, S) float32. Raises ValueError as plan_views does.
    """
    plan = plan_views(image.height, image.width, preprocess, num_views, kind, seed)
    return cut_views(pixels_of(image), plan, preprocess)


def crop_view(image: Image.Image, preprocess: Preprocess, seed: int, crop_scale: tuple[float, float]) -> Tensor:
    """Make one random crop with a random flip, for training.

    image: RGB, as read_image returns it; crop_scale: the least and the largest share of the image. Returns (3, S, S)
    float32.
    """
    view = random_views(image.height, image.width, preprocess.image_size, 1, _generator(seed), scale=crop_scale)
    return cut_views(pixels_of(image), view, preprocess)[0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
