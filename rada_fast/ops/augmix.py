"""AugMix (Hendrycks et al., ICLR 2020) of views of decoded pictures with Pillow's arithmetic, and how it is drawn."""

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
"""What a step of a chain can do to a view's pixels, by number; "affine" covers rotations, shears and shifts."""


class AugmixPlan(NamedTuple):
    """How AugMix changes N views, by C chains of up to L operations. The tensors are on the CPU, which draws them.

    views: (N, 11) int64, as ops.multi_view_crops has them.
    operations: (N, C, L) int64, numbers of AUGMIX_OPERATIONS.
    matrices: (N, C, L, 6) float64, of an affine operation the matrix from places in the result to places in its source,
        in pixels, as Image.transform takes it; of posterize and solarize first the bits to keep or the least value to
        invert.
    weights: (N, C + 2) float32: of the chains, then of the plain view and of the mix of the chains.
    """

    views: Tensor
    operations: Tensor
    matrices: Tensor
    weights: Tensor

    def with_plain(self, views: Tensor) -> AugmixPlan:
        """This plan after further views, (M, 11), that AugMix leaves as they are."""
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
    """Views and how AugMix changes each, drawn one after another as test-time prompt tuning draws them.

    height, width: of the picture, in pixels; size: S; count: views N; generator: on the CPU; scale, ratio: see
    random_views; chains: C, each of one to depth (L) of nine operations: autocontrast, equalize, posterize, rotate,
    solarize, shears and shifts either way; severity: of 10. The chains' weights are Dirichlet(1), the plain view's
    share is uniform.
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
    """AugMix of views: out = share * n(view) + rest * sum_c weight_c * n(chain_c(view)), n(x) = (x / 255 - mean) / std.

    pictures, size, mean, std, dtype: as ops.multi_view_crops; plan: the views and how each is changed.
    Returns (N, 3, S, S), on the pictures' device. Chains work on 8-bit pixels with Pillow's arithmetic, and are mixed
    in float32; float32 results equal PIL's and PyTorch's bit for bit, the others are those rounded.
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
