"""AugMix of views with Pillow's operations and PyTorch's random numbers; the compiled operators equal it to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from rada_fast.reference import multi_view_crops as crops

NONE, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, AFFINE = range(6)


def augmix(
    pictures: Sequence[Tensor],
    views: Tensor,
    operations: Tensor,
    matrices: Tensor,
    weights: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply AugMix to views. The arguments and the result are those of ops.augmix, with the tensors of the plan."""
    images = crops.on_the_host(pictures)
    results = []
    for row, chains, values, (*shares, share, rest) in zip(
        views.tolist(), operations.tolist(), matrices.tolist(), weights.cpu().unbind(0), strict=True
    ):
        view = crops.crop(images[row[0]], row, size)
        mixed = torch.zeros(())
        for weight, chain, steps in zip(shares, chains, values, strict=True):
            image = view
            for operation, value in zip(chain, steps, strict=True):
                image = apply(image, operation, value)
            mixed = mixed + weight * crops.to_normalised(image, mean, std)
        results.append(share * crops.to_normalised(view, mean, std) + rest * mixed)
    return crops.on_their_device(results, pictures, size, dtype)


def apply(image: Image.Image, operation: int, value: Sequence[float]) -> Image.Image:
    """Apply one operation to a view.

    value: an affine matrix, or first the bits to keep or the least value to invert.
    """
    match operation:
        case 0:
            return image
        case 1:
            return ImageOps.autocontrast(image)
        case 2:
            return ImageOps.equalize(image)
        case 3:
            return ImageOps.posterize(image, int(value[0]))
        case 4:
            return ImageOps.solarize(image, int(value[0]))
        case 5:
            return image.transform(image.size, Image.Transform.AFFINE, value, resample=Image.Resampling.BILINEAR)
        case _:
            raise ValueError(f"operations must be 0..5, got {operation}")


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _signed(value: float) -> float:
    return -value if torch.rand(()) > 0.5 else value


def _rotation(degrees: float, size: int) -> list[float]:
    """Return the matrix that Image.rotate uses."""
    angle = -math.radians(degrees % 360.0)
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    d, e = round(-math.sin(angle), 15), round(math.cos(angle), 15)
    centre = size / 2
    return [a, b, a * -centre + b * -centre + 0.0 + centre, d, e, d * -centre + e * -centre + 0.0 + centre]


def _draw(severity: float, size: int) -> tuple[int, list[float]]:
    """Draw one of the nine operations and its strength, which is between 0.1 / 10 and severity / 10 of the largest."""

    def level(most: float) -> float:
        return _uniform(0.1, severity) * most / 10

    identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    drawn = int(torch.randint(9, ()))
    match drawn:
        case 0 | 1:
            return (AUTOCONTRAST, EQUALIZE)[drawn], identity
        case 2:
            return POSTERIZE, [4 - int(level(4)), *identity[1:]]
        case 3:
            degrees = _signed(int(level(30)))
            return (AFFINE, _rotation(degrees, size)) if degrees else (NONE, identity)
        case 4:
            return SOLARIZE, [256 - int(level(256)), *identity[1:]]
        case 5 | 6:
            identity[1 if drawn == 5 else 3] = _signed(level(0.3))
            return AFFINE, identity
        case _:
            identity[2 if drawn == 7 else 5] = _signed(int(level(size / 3)))
            return AFFINE, identity


def random_augmix(
    height: int,
    width: int,
    size: int,
    count: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    chains: int,
    depth: int,
    severity: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a plan. The arguments are those of ops.random_augmix; returns the tensors of the plan."""
    views = []
    operations = torch.zeros((count, chains, depth), dtype=torch.int64)
    matrices = torch.zeros((count, chains, depth, 6), dtype=torch.float64)
    weights = torch.empty((count, chains + 2))
    with torch.random.fork_rng(devices=[]):
        for index in range(count):
            views.append(crops.random_views(height, width, size, 1, generator, scale, ratio))
            torch.default_generator.set_state(generator.get_state())
            # Normalised exponentials are Dirichlet(1, ..., 1), and a uniform number is Beta(1, 1).
            shares = torch.empty(chains).exponential_()
            share = float(torch.rand(()))
            weights[index] = torch.cat([shares / shares.sum(), torch.tensor([share, 1 - share])])
            for chain in range(chains):
                for step in range(int(torch.randint(1, depth + 1, ()))):
                    operation, value = _draw(severity, size)
                    operations[index, chain, step] = operation
                    matrices[index, chain, step] = torch.tensor(value, dtype=torch.float64)
            generator.set_state(torch.default_generator.get_state())
    return torch.cat([torch.empty((0, 11), dtype=torch.int64), *views]), operations, matrices, weights
