"""Encode images with a small vision transformer in one call of the compiled library, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops._backends import library
from rada_fast.ops._backends.choice import reference_asked
from rada_fast.ops._backends.transforms import under_transform

MOST_LAYER_BYTES = 2**21
"""The weights of a block may take so many bytes. Larger ones leave the cache of a core before the next images need
them, and one product after the other for many images is then faster."""

Affine = tuple[Tensor, Tensor]
"""A weight and a bias."""


class Norm(NamedTuple):
    """A layer normalisation over the last axis: weight and bias (W), and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


class Block(NamedTuple):
    """The weights of a residual block, as nn.Linear keeps them.

    norm_1, norm_2: the normalisations before the attention and before the MLP.
    projection: the projection to queries, keys and values, (3 W, W) and (3 W).
    output: the projection of the attention's result.
    hidden: the first layer of the MLP, whose width is any.
    mlp_output: the second layer of the MLP.
    """

    norm_1: Norm
    projection: Affine
    output: Affine
    norm_2: Norm
    hidden: Affine
    mlp_output: Affine


class Transformer(NamedTuple):
    """A vision transformer that pools its class token; all tensors are float32.

    patch_size: the height and the width of a patch.
    patches: the weight (W, C * height * width) that embeds a patch.
    positions: (L, W), with the class token added to the first row.
    norm_pre, norm_post: the normalisations before the first block and after the last, or None.
    blocks: the residual blocks.
    heads: the number of heads, a divisor of W.
    activation: that of the MLPs.
    projection: (W, D), or None where the features are the pooled token.
    """

    patch_size: tuple[int, int]
    patches: Tensor
    positions: Tensor
    norm_pre: Norm | None
    blocks: Sequence[Block]
    norm_post: Norm | None
    heads: int
    activation: Literal["gelu", "silu"]
    projection: Tensor | None


class SmallTransformer:
    """A vision transformer whose weights are arranged once for the operator that encodes images with it.

    The last block computes the pooled token alone, and its keys and values in an order that needs no projection of all
    tokens; everything is computed in float32. Features do not depend, to the bit, on what else is encoded in the call.

    transformer: the weights, which are copied. The oracle of the tests is open_clip's module with the same ones.

    Raises BackendUnavailableError where the compiled library cannot be used.
    """

    def __init__(self, transformer: Transformer) -> None:
        if (reason := library.load()) is not None:
            raise BackendUnavailableError(reason)
        self._patch_size, self._heads = list(transformer.patch_size), transformer.heads
        self._activation = transformer.activation
        norms: list[Norm | None] = [transformer.norm_pre]
        weights = [_panels(transformer.patches), transformer.positions, *_affine(transformer.norm_pre)]
        for block in transformer.blocks:
            (weight, bias), width = block.projection, block.output[0].shape[1]
            weights += _affine(block.norm_1)
            if block is transformer.blocks[-1]:
                weights += [_panels(weight[:width]), bias[:width]]
                weights += [weight[width : 2 * width], weight[2 * width :].T, bias[2 * width :]]
            else:
                weights += [_panels(weight), bias]
            weights += [_panels(block.output[0]), block.output[1], *_affine(block.norm_2)]
            weights += [_panels(block.hidden[0]), block.hidden[1], _panels(block.mlp_output[0]), block.mlp_output[1]]
            norms += [block.norm_1, block.norm_2]
        weights += _affine(transformer.norm_post)
        weights.append(torch.empty(0) if transformer.projection is None else _panels(transformer.projection.T))
        norms.append(transformer.norm_post)
        last = transformer.positions if transformer.projection is None else transformer.projection
        self._width = last.shape[1]
        self._weights = [weight.detach().clone(memory_format=torch.contiguous_format) for weight in weights]
        self._eps = [0.0 if norm is None else norm.eps for norm in norms]

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (N, C, S, S') float32 on the CPU to features (N, D) float32."""
        features: Tensor = torch.ops.rada_fast.small_transformer(
            images, self._weights, self._width, self._patch_size, self._heads, self._activation, self._eps
        )
        return features


def serves_small_transformer(width: int, hidden: int) -> bool:
    """Return whether SmallTransformer is usable here, and fast for blocks of this width and this width of the MLP."""
    fits = 4 * (4 * width**2 + 2 * width * hidden) <= MOST_LAYER_BYTES
    return fits and not under_transform() and not reference_asked() and _is_usable()


@cache
def _is_usable() -> bool:
    """Return whether the compiled operators are there, and the processor has fast products of small matrices."""
    if library.load() is not None:
        return False
    rows = torch.ones(1, 2, 2)
    try:
        torch.ops.rada_fast.panels_of(rows[0])
        return bool((torch.ops.rada_fast.encoder_attention(rows, rows, rows, 1) == 1).all())
    except (AttributeError, RuntimeError):  # an older build lacks them, or the processor lacks instructions
        return False


def _affine(norm: Norm | None) -> tuple[Tensor, Tensor]:
    return (torch.empty(0), torch.empty(0)) if norm is None else (norm.weight, norm.bias)


def _panels(weight: Tensor) -> Tensor:
    """Arrange a weight (N, K) as the right factor (K, N) of products."""
    panels: Tensor = torch.ops.rada_fast.panels_of(weight.detach().T)
    return panels
