"""64 views of one decoded picture of 500 x 375 pixels, made on one core.

The providers of crops are Pillow with ToTensor and Normalize, which is the reference path of make_views, torchvision's
v2 transforms on a uint8 tensor, kornia where it is installed, and the compiled operator. Those of AugMix are Pillow and
the compiled operator. Drawing the views is part of every time, and a device's time includes the copy of the picture to
it. Pillow and the compiled operator must agree bit for bit; the others draw or round in their own way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.timing import Case, Provider
from rada_fast.data.views import Preprocess, make_views
from rada_fast.extension import libraries
from rada_fast.ops import multi_view_crops, random_views, use_backend

PREPROCESS = Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
VIEWS, SEED = 64, 3

pytestmark = pytest.mark.skipif(libraries.load() is not None, reason=str(libraries.load()))


def picture() -> Image.Image:
    """Blocks of colour with some noise, so that the histograms look like a photograph's."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 256, (38, 50, 3)), np.ones((10, 10, 1)))[:375, :500]
    return Image.fromarray((blocks + rng.integers(-20, 20, blocks.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_pillow(kind: Any) -> Callable[[], Tensor]:
    image = picture()

    def run() -> Tensor:
        with use_backend("reference"):
            return make_views(image, PREPROCESS, VIEWS, kind, SEED)

    return run


def by_torchvision() -> Callable[[], Tensor]:
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1).contiguous()
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(PREPROCESS.image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(PREPROCESS.mean), list(PREPROCESS.std)),
        ]
    )
    return lambda: torch.stack([transform(pixels) for _ in range(VIEWS)])


def by_kornia() -> Callable[[], Tensor]:
    import kornia.augmentation as augmentation

    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None].float() / 255
    transform = torch.nn.Sequential(
        augmentation.RandomResizedCrop((PREPROCESS.image_size,) * 2, scale=(0.08, 1.0)),
        augmentation.RandomHorizontalFlip(),
        augmentation.Normalize(torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)),
    )
    return lambda: transform(pixels.expand(VIEWS, -1, -1, -1))


def in_bfloat16() -> Callable[[], Tensor]:
    pixels = torch.from_numpy(np.array(picture()))

    def run() -> Tensor:
        views = random_views(375, 500, PREPROCESS.image_size, VIEWS, torch.Generator().manual_seed(SEED))
        return multi_view_crops(
            [pixels], views, PREPROCESS.image_size, PREPROCESS.mean, PREPROCESS.std, dtype=torch.bfloat16
        )

    return run


def on_device() -> Callable[[], Tensor]:
    pixels = torch.from_numpy(np.array(picture()))

    def run() -> Tensor:
        views = random_views(375, 500, PREPROCESS.image_size, VIEWS, torch.Generator().manual_seed(SEED))
        crops = multi_view_crops([pixels.cuda()], views, PREPROCESS.image_size, PREPROCESS.mean, PREPROCESS.std)
        torch.cuda.synchronize()
        return crops

    return run


@pytest.mark.parametrize("kind", ["crop", "augmix"])
def test_bench_views(measured: Callable[[Case], None], device: str, kind: Any) -> None:
    image = picture()
    pillow = by_pillow(kind)
    providers = {
        "pillow": Provider(pillow, tolerance=0),
        "ours": Provider(lambda: make_views(image, PREPROCESS, VIEWS, kind, SEED), tolerance=0),
    }
    if kind == "crop":
        others = {"torchvision v2": by_torchvision(), "ours, bfloat16": in_bfloat16()}
        if device == "cuda" and libraries.load_cuda() is None:
            others["ours, on the device"] = on_device()
        if importlib.util.find_spec("kornia") is not None:
            others["kornia"] = by_kornia()
        providers |= {name: Provider(call, tolerance=None) for name, call in others.items()}
    measured(
        Case(
            name=f"{VIEWS} views, {kind}",
            device="cpu",
            providers=providers,
            baseline="pillow",
            expected=pillow(),
            least_bytes=VIEWS * 3 * PREPROCESS.image_size**2 * 4,
        )
    )
