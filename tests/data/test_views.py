"""Views are torchvision's draws from the image's own seed, whatever the order, workers or other images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.data.views import (
    Preprocess,
    ViewDataset,
    center_view,
    collate_single,
    crop_view,
    image_seed,
    make_views,
)

PREPROCESS = Preprocess(32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def picture(width: int = 50, height: int = 37, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(50, 37), (1, 1), (1, 400), (32, 32), (300, 20)])
def test_the_original_view_is_torchvisions_evaluation_view(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESS.mean, PREPROCESS.std),
        ]
    )(image)
    assert torch.equal(center_view(image, PREPROCESS), expected)
    assert torch.equal(make_views(image, PREPROCESS, 1, "crop", 5)[0], expected)


def test_crops_are_torchvisions_draws_from_the_seed() -> None:
    image = picture()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESS.mean, PREPROCESS.std),
        ]
    )
    seed = image_seed(3, "a/b.png")
    views = make_views(image, PREPROCESS, 9, "crop", seed)
    torch.manual_seed(seed)
    assert torch.equal(views[1:], torch.stack([transform(image) for _ in range(8)]))


@pytest.mark.parametrize("kind", ["crop", "augmix"])
def test_views_leave_the_global_random_state_alone_and_repeat(kind: str) -> None:
    image = picture()
    state = torch.get_rng_state()
    first = make_views(image, PREPROCESS, 5, kind, 7)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(make_views(image, PREPROCESS, 5, kind, 7), first)  # type: ignore[arg-type]
    assert not torch.equal(make_views(image, PREPROCESS, 5, kind, 8)[1:], first[1:])  # type: ignore[arg-type]
    # More views continue the same draws.
    assert torch.equal(make_views(image, PREPROCESS, 9, kind, 7)[:5], first)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (50, 37)])
def test_augmix_accepts_pictures_of_every_size(size: tuple[int, int]) -> None:
    for seed in range(8):
        assert bool(make_views(picture(*size), PREPROCESS, 4, "augmix", seed).isfinite().all())


def test_augmix_stays_within_the_pictures_range() -> None:
    views = make_views(picture(), PREPROCESS, 12, "augmix", 1)
    pixels = views * torch.tensor(PREPROCESS.std).view(3, 1, 1) + torch.tensor(PREPROCESS.mean).view(3, 1, 1)
    # A mix of pictures in 0..1 is in 0..1 too, up to float32 rounding of the normalisation.
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    assert bool(views.isfinite().all())


def test_seeds_depend_on_both_arguments_and_fit_a_generator() -> None:
    seeds = {image_seed(seed, name) for seed in range(4) for name in ("a", "b", "c")}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    for label, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for index in range(3):
            picture(seed=10 * label + index).save(tmp_path / name / f"{index}.png")
    (tmp_path / "a" / "1.png").write_bytes(b"damaged")
    source = open_source(f"imagefolder:{tmp_path}")
    assert isinstance(source, ImageFolder)
    return source


@pytest.mark.parametrize("views", [0, 3])
def test_workers_and_order_change_no_view(folder: ImageFolder, views: int) -> None:
    def load(samples: tuple, workers: int) -> dict[str, object]:  # type: ignore[type-arg]
        dataset = ViewDataset(samples, PREPROCESS, views, "crop", seed=4)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=collate_single)
        return {samples[index].id: (view, reason) for index, view, reason in loader}

    plain, spread = load(folder.samples, 0), load(folder.samples[::-1], 2)
    assert plain.keys() == spread.keys()
    for id, (view, reason) in plain.items():  # type: ignore[misc]
        if id == "a/1.png":
            assert view is None
            assert "1.png cannot be read" in reason
            assert spread[id] == (None, reason)
        else:
            assert torch.equal(view, spread[id][0])  # type: ignore[index]
            assert view.shape == (max(views, 1), 3, 32, 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(50, 37), (20, 90), (32, 32)])
def test_the_original_view_is_open_clips_evaluation_view(
    interpolation: Any, resize: Any, size: tuple[int, int]
) -> None:
    preprocess = Preprocess(32, PREPROCESS.mean, PREPROCESS.std, interpolation, resize)
    transform = open_clip.image_transform(
        32, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std, interpolation=interpolation, resize_mode=resize
    )
    image = picture(*size)
    assert torch.equal(center_view(image, preprocess), transform(image))


def test_draws_seed_only_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.manual_seed seeds every CUDA device, whose state fork_rng(devices=[]) does not put back.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a CUDA device was seeded"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    make_views(picture(), PREPROCESS, 2, "augmix", 1)
    crop_view(picture(), PREPROCESS, 1, (0.5, 1.0))


def test_impossible_views_are_refused() -> None:
    with pytest.raises(ValueError, match="num_views must be at least 1, got 0"):
        make_views(picture(), PREPROCESS, 0, "crop", 1)
    with pytest.raises(ValueError, match="kind must be crop or augmix, got 'mix'"):
        make_views(picture(), PREPROCESS, 2, "mix", 1)  # type: ignore[arg-type]
