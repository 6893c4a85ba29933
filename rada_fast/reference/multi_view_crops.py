"""Views of pictures by Pillow and torchvision themselves; the compiled operators equal them to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as F


def multi_view_crops(
    pictures: Sequence[Tensor],
    views: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut views out of pictures. The arguments and the result are those of ops.multi_view_crops."""
    images = on_the_host(pictures)
    results = [to_normalised(crop(images[row[0]], row, size), mean, std) for row in views.tolist()]
    return on_their_device(results, pictures, size, dtype)


def on_the_host(pictures: Sequence[Tensor]) -> list[Image.Image]:
    """Copy pictures to the host, as images of Pillow."""
    return [Image.fromarray(picture.cpu().contiguous().numpy()) for picture in pictures]


def on_their_device(views: list[Tensor], pictures: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Put views together on the device of their pictures. views: each (3, S, S). Returns (N, 3, S, S)."""
    device = pictures[0].device if pictures else torch.device("cpu")
    return (
        torch.stack(views).to(device, dtype) if views else torch.empty((0, 3, size, size), dtype=dtype, device=device)
    )


def crop(image: Image.Image, row: Sequence[int], size: int) -> Image.Image:
    """Cut one view, before its normalisation. row: a row of the table of views."""
    _, top, left, height, width, resized_height, resized_width, window_top, window_left, flip, bicubic = row
    image = image.crop((left, top, left + width, top + height))
    if image.size != (resized_width, resized_height):
        method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        image = image.resize((resized_width, resized_height), method)
    image = image.crop((window_left, window_top, window_left + size, window_top + size))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def to_normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert a view as ToTensor and Normalize do. Returns (3, height, width) float32, normalised by channel."""
    return F.normalize(F.to_tensor(image), list(mean), list(std))


def random_views(
    height: int,
    width: int,
    size: int,
    count: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Draw views with torchvision's own transforms. The arguments and the result are those of ops.random_views."""
    # get_params and RandomHorizontalFlip look at sizes only. They draw from the global stream, which is restored.
    picture = torch.empty((1, height, width), device="meta")
    marked = torch.tensor([[0, 1]])
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        for _ in range(count):
            box = RandomResizedCrop.get_params(picture, list(scale), list(ratio))
            flip = int(RandomHorizontalFlip()(marked)[0, 0])
            rows.append([0, *box, size, size, 0, 0, flip, 0])
        generator.set_state(torch.default_generator.get_state())
    return torch.tensor(rows, dtype=torch.int64).reshape(count, 11)
