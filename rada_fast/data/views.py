"""Views of one image: the original, random crops, and AugMix; every draw comes from (seed, image id)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as F

from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.sources import Sample
from rada_fast.ops import augmix, multi_view_crops, random_augmix, random_views, views_are_compiled, whole_view
from rada_fast.ops.multi_view_crops import CROP_SCALE as CROP_SCALE

ViewKind = Literal["crop", "augmix"]

AUGMIX_CHAINS, AUGMIX_MOST_DEPTH, AUGMIX_SEVERITY = 3, 3, 1
"""AugMix as test-time prompt tuning uses it: three chains of one to three operations at the lowest severity."""


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images.

    image_size: side S in pixels; mean, std: by channel, of values in 0..1; interpolation: of the original's resize;
    resize: its shorter side to S and a centre crop, or "squash", both sides to S, as SigLIP and some others have it.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"


def image_seed(seed: int, image_id: str) -> int:
    """A 63-bit seed that depends on the two arguments alone."""
    digest = hashlib.sha256(os.fsencode(f"{seed} {image_id}")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _compiled(image: Image.Image) -> bool:
    """Whether the compiled operators serve: they give what Pillow and torchvision give here, sooner."""
    return image.mode == "RGB" and views_are_compiled()


def _pixels(image: Image.Image) -> Tensor:
    """(height, width, 3) uint8."""
    return torch.from_numpy(np.array(image))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _crops(image: Image.Image, preprocess: Preprocess, views: Tensor) -> Tensor:
    return multi_view_crops(
        [_pixels(image)], views, preprocess.image_size, preprocess.mean, preprocess.std, backend="cpu"
    )


def _original(image: Image.Image, preprocess: Preprocess) -> Tensor:
    return whole_view(
        image.height,
        image.width,
        preprocess.image_size,
        resize=preprocess.resize,
        interpolation=preprocess.interpolation,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU as after torch.manual_seed(seed); the state from before comes back."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every CUDA device too, and nothing would put their states back.
        torch.default_generator.manual_seed(seed)
        yield


def to_normalised(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """(3, height, width) float32, normalised by channel."""
    return F.normalize(F.to_tensor(image), list(preprocess.mean), list(preprocess.std))


def center_view(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """The original, as open_clip's evaluation transform makes it: resized, centre cropped, normalised.

    Returns (3, S, S).
    """
    if _compiled(image):
        return _crops(image, preprocess, _original(image, preprocess))[0]
    size = preprocess.image_size
    mode = InterpolationMode(preprocess.interpolation)
    if preprocess.resize == "squash":
        return to_normalised(F.resize(image, [size, size], mode), preprocess)
    return to_normalised(F.center_crop(F.resize(image, size, mode), [size, size]), preprocess)


def make_views(
    image: Image.Image,
    preprocess: Preprocess,
    num_views: int,
    kind: ViewKind,
    seed: int,
) -> Tensor:
    """The original and num_views - 1 random views. Returns (V, 3, S, S) float32.

    Boxes and flips are those that torchvision's RandomResizedCrop (bilinear) and RandomHorizontalFlip draw after
    torch.manual_seed(seed); AugMix draws from the same stream. The global random state is left alone.
    Raises ValueError where num_views is below 1 or the kind unknown.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    if kind not in ("crop", "augmix"):
        raise ValueError(f"kind must be crop or augmix, got {kind!r}")
    if kind == "crop" and _compiled(image):
        drawn = random_views(
            image.height, image.width, preprocess.image_size, num_views - 1, _generator(seed), backend="cpu"
        )
        return _crops(image, preprocess, torch.cat([_original(image, preprocess), drawn]))
    if kind == "augmix" and AUGMIX_OPERATIONS is _COMPILED_OPERATIONS and _compiled(image):
        size = preprocess.image_size
        plan = random_augmix(
            image.height,
            image.width,
            size,
            num_views - 1,
            _generator(seed),
            chains=AUGMIX_CHAINS,
            depth=AUGMIX_MOST_DEPTH,
            severity=AUGMIX_SEVERITY,
            backend="cpu",
        ).with_plain(_original(image, preprocess))
        return augmix([_pixels(image)], plan, size, preprocess.mean, preprocess.std, backend="cpu")
    crop = RandomResizedCrop(preprocess.image_size, scale=CROP_SCALE)
    flip = RandomHorizontalFlip()
    views = [center_view(image, preprocess)]
    with _seeded(seed):
        for _ in range(num_views - 1):
            view = flip(crop(image))
            views.append(_augmix(view, preprocess) if kind == "augmix" else to_normalised(view, preprocess))
    return torch.stack(views)


def crop_view(image: Image.Image, preprocess: Preprocess, seed: int, crop_scale: tuple[float, float]) -> Tensor:
    """One random crop with a random flip, for training. Returns (3, S, S)."""
    if _compiled(image):
        size = preprocess.image_size
        view = random_views(image.height, image.width, size, 1, _generator(seed), scale=crop_scale, backend="cpu")
        return _crops(image, preprocess, view)[0]
    with _seeded(seed):
        crop = RandomResizedCrop(preprocess.image_size, scale=crop_scale)
        return to_normalised(RandomHorizontalFlip()(crop(image)), preprocess)


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _level(most: float) -> float:
    """A strength between 0.1 and the severity, as a share of an operation's largest value, over 10."""
    return _uniform(0.1, AUGMIX_SEVERITY) * most / 10


def _signed(value: float) -> float:
    return -value if torch.rand(()) > 0.5 else value


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


def _rotate(image: Image.Image) -> Image.Image:
    return image.rotate(_signed(int(_level(30))), resample=Image.Resampling.BILINEAR)


def _posterize(image: Image.Image) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(_level(4)))


def _solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(_level(256)))


def _shear_x(image: Image.Image) -> Image.Image:
    return _affine(image, (1, _signed(_level(0.3)), 0, 0, 1, 0))


def _shear_y(image: Image.Image) -> Image.Image:
    return _affine(image, (1, 0, 0, _signed(_level(0.3)), 1, 0))


def _translate_x(image: Image.Image) -> Image.Image:
    return _affine(image, (1, 0, _signed(int(_level(image.width / 3))), 0, 1, 0))


def _translate_y(image: Image.Image) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(int(_level(image.height / 3)))))


AUGMIX_OPERATIONS: tuple[Callable[[Image.Image], Image.Image], ...] = (
    ImageOps.autocontrast,
    ImageOps.equalize,
    _posterize,
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
_COMPILED_OPERATIONS = AUGMIX_OPERATIONS
"""Those that the compiled operator draws from, in the same order."""


def _augmix(view: Image.Image, preprocess: Preprocess) -> Tensor:
    """AugMix (Hendrycks et al., ICLR 2020) of one cropped view; chains are mixed after normalisation.

    Weights of the chains are Dirichlet(1), the weight of their mix against the plain view is Beta(1, 1).
    """
    # Dirichlet(1, ..., 1) is normalised exponentials; Beta(1, 1) is uniform. Both draw from torch's seeded stream.
    weights = torch.empty(AUGMIX_CHAINS).exponential_()
    weights = weights / weights.sum()
    share = float(torch.rand(()))
    mixed = torch.zeros(())
    for weight in weights:
        augmented = view
        for _ in range(int(torch.randint(1, AUGMIX_MOST_DEPTH + 1, ()))):
            augmented = AUGMIX_OPERATIONS[int(torch.randint(len(AUGMIX_OPERATIONS), ()))](augmented)
        mixed = mixed + weight * to_normalised(augmented, preprocess)
    return share * to_normalised(view, preprocess) + (1 - share) * mixed


Item = tuple[int, Tensor | None, str | None]
Anything = TypeVar("Anything")


class ViewDataset(Dataset[Item]):
    """Views of image files: (index, views (V, 3, S, S), None), or (index, None, reason) for an unreadable file.

    samples: the files; num_views: V, the original first, or 0 for one random training crop (1, 3, S, S);
    crop_scale: of training crops; kind, seed: see make_views; an image's own seed is image_seed(seed, id).
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
            return index, None, str(error)
        seed = image_seed(self.seed, sample.id)
        if self.num_views == 0:
            return index, crop_view(image, self.preprocess, seed, self.crop_scale)[None], None
        return index, make_views(image, self.preprocess, self.num_views, self.kind, seed), None


def as_it_is(item: Anything) -> Anything:
    """The collate function of a loader that hands on single items."""
    return item
