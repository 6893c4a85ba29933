"""Draw AugMix operations (Hendrycks et al., ICLR 2020) and apply them to views of pictures with Pillow's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rada_fast.ops._views import (
    CROP_RATIO,
    CROP_SCALE,
    TALL_FIRST,
    check_draw,
    check_views,
    cuts_compiled,
    views_are_compiled,
)

AUGMIX_OPERATIONS = ("none", "autocontrast", "equalize", "posterize", "solarize", "affine")
"""The operations of which chains consist, in the order of their numbers; "affine" is any rotation, shear or shift."""


class AugmixPlan(NamedTuple):
    """Hold N views and the operations of AugMix for each: C chains of up to L operations. All tensors are on the CPU.

    views: (N, 11) int64, a table of views as ops.multi_view_crops takes it.
    operations: (N, C, L) int64, indices into AUGMIX_OPERATIONS.
    matrices: (N, C, L, 6) float64, the operations' parameters. An affine operation has the matrix from pixel positions
        in its result to those in its source, in the form of PIL's Image.transform; posterize has the number of bits to
        keep, and solarize the least value to invert, in the first place.
    weights: (N, C + 2) float32, the weights of the chains, then those of the unchanged view and of the mix of chains.
    """

    views: Tensor
    operations: Tensor
    matrices: Tensor
    weights: Tensor

    def with_plain(self, views: Tensor) -> AugmixPlan:
        """Return this plan with further views, (M, 11), in front, which AugMix leaves unchanged."""
        count, (_, chains, depth) = len(views), self.operations.shape
        weights = torch.zeros((count, chains + 2))
        weights[:, chains] = 1
        return AugmixPlan(
            torch.cat([views, self.views]),
            torch.cat([self.operations.new_zeros((count, chains, depth)), self.operations]),
            torch.cat([self.matrices.new_zeros((count, chains, depth, 6)), self.matrices]),
            torch.cat([weights, self.weights]),
        )


def random_augmix(
    height: int,
    width: int,
    size: int,
    count: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = CROP_SCALE,
    ratio: tuple[float, float] = CROP_RATIO,
    chains: int = 3,
    depth: int = 3,
    severity: float = 1.0,
    backend: str | None = None,
) -> AugmixPlan:
    """Draw views and the AugMix operations of each, in the order in which test-time prompt tuning draws them.

    height, width: the size of the picture, in pixels.
    size: the side S of a view.
    count: the number N of views.
    generator: a generator on the CPU.
    scale, ratio: see random_views.
    chains: the number C of chains. Each applies between one and `depth` of nine operations: autocontrast, equalize,
        posterize, rotate, solarize, and shears and shifts along either axis.
    depth: the most operations L of a chain.
    severity: the strength of the operations, from 0.1 to 10.

    The chains' weights follow Dirichlet(1, ..., 1), and the share of the unchanged view is uniform.
    Raises ValueError for sizes, chains or a depth below 1, a negative count, or a severity outside 0.1..10.
    """
    check_draw(height, width, size, count)
    if min(chains, depth) < 1 or not 0.1 <= severity <= 10:
        raise ValueError(
            f"chains and depth must be at least 1 and severity in 0.1..10, got {chains}, {depth} and {severity}"
        )
    if views_are_compiled(backend):
        drawn = torch.ops.rada_fast.random_augmix(
            height, width, size, count, scale, ratio, chains, depth, severity, generator
        )
        return AugmixPlan(*drawn)
    from rada_fast.reference import augmix as reference

    return AugmixPlan(
        *reference.random_augmix(height, width, size, count, generator, scale, ratio, chains, depth, severity)
    )


def augmix(
    pictures: Sequence[Tensor],
    plan: AugmixPlan,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Cut each view and mix it with the results of its AugMix chains.

        out = share * n(view) + rest * sum_c weight_c * n(chain_c(view)),   n(x) = (x / 255 - mean) / std

    plan: the views with their operations and weights: weight_c for chain c, then share and rest.
    pictures, size, mean, std, dtype: see ops.multi_view_crops.

    Returns (N, 3, S, S), on the pictures' device. Chains compute on 8-bit pixels with Pillow's arithmetic, and are
    mixed in float32. Results in float32 equal those of PIL and PyTorch bit for bit; other types round them.
    Raises ValueError where an argument has a wrong shape or type, or a view leaves its picture.
    Equivalent to share * plain + rest * sum(weight * normalise(chain(view))) with PIL's ImageOps and Image.transform.
    """
    views, operations, matrices, weights = plan
    check_views(pictures, views, size, mean, std, dtype)
    count, (chains, depth) = len(views), operations.shape[1:] if operations.ndim == 3 else (0, 0)
    for name, tensor, shape, kind in (
        ("operations", operations, (count, chains, depth), torch.int64),
        ("matrices", matrices, (count, chains, depth, 6), torch.float64),
        ("weights", weights, (count, chains + 2), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != kind or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {shape} {kind} on the CPU, got {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
            )
    if operations.numel() and not 0 <= int(operations.min()) <= int(operations.max()) < len(AUGMIX_OPERATIONS):
        raise ValueError(
            f"operations must be 0..{len(AUGMIX_OPERATIONS) - 1}, got {int(operations.min())}..{int(operations.max())}"
        )
    bits = matrices[..., 0][operations == AUGMIX_OPERATIONS.index("posterize")]
    if bool(((bits < 1) | (bits > 8)).any()):
        raise ValueError(f"posterize keeps 1 to 8 bits, got {sorted(set(bits.tolist()))}")
    if cuts_compiled(pictures, backend):
        mixed: Tensor = torch.ops.rada_fast.augmix(
            list(pictures), views, operations, matrices, weights, size, list(mean), list(std), dtype, TALL_FIRST
        )
        return mixed
    from rada_fast.reference import augmix as reference

    return reference.augmix(pictures, views, operations, matrices, weights, size, mean, std, dtype)
