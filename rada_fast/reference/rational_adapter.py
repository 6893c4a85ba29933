"""The whole rational adapter in plain PyTorch (RAda, arXiv:2507.15480, Eq. 2, 4, 6, 7 and 16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.reference.class_attention import class_attention
from rada_fast.reference.masked_logits import mask_penalty, masked_logits, rational_mask
from rada_fast.reference.rational_projections import (
    Parameters,
    Projections,
    as_scale,
    input_scales,
    layer_projections,
    project,
    rational_matrix,
    rational_projections,
)


@dataclass(frozen=True)
class Projected:
    """Keep the keys, values and queries of a call for a later call with the same features.

    tensors: what the backend has kept, one episode after the other where it computes each by itself. scale: by which
        factor the later call's projections are larger.
    """

    tensors: tuple[Tensor | None, ...]
    scale: float = 1.0

    def scaled(self, scale: float) -> Projected:
        """Return the projections by weights and biases that are `scale` times as large."""
        return Projected(self.tensors, self.scale * scale)

    def split(self, episodes: int) -> list[Projected]:
        """Return what belongs to each episode."""
        size = len(self.tensors) // episodes
        return [Projected(self.tensors[size * at : size * (at + 1)], self.scale) for at in range(episodes)]


class AdapterOutput(NamedTuple):
    """The results of the adapter: logits (B, K), and where they are asked for the penalty () and the mask (B, K, D).

    projected: the projections, for a later call, where they are asked for and the backend gives them.
    """

    logits: Tensor
    penalty: Tensor | None
    mask: Tensor | None
    projected: Projected | None = None


def mask_offset(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    parameters: Parameters,
    config: AdapterConfig,
    projections: Projections | None,
) -> Tensor:
    """Compute A = A_1 + ... + A_L, which the adapter adds to a mask of ones. Returns (B, K, D).

    image_features: (B, D); text_features: (K, D); logit_scale: (). projections: those of the first layer of attention.
    """
    if projections is None:
        scale = input_scales(logit_scale, config)[1]
        rational = scale * rational_matrix(image_features, text_features)  # (B, K, D)
        return project(project(rational, parameters, "fc").relu(), parameters, "out_proj")  # (B, K, D)

    def attend(projections: Projections) -> Tensor:
        """Compute the attention of one layer. Returns (B, K, D)."""
        return class_attention(
            projections.queries.values(),
            projections.keys,
            projections.values,
            temperature=config.temperature,
            softmax=config.softmax,
        )

    offset = project(attend(projections), parameters, "out_proj")  # A_1: (B, K, D)
    for layer in range(2, config.num_layers + 1):
        prefix = f"layers.{layer - 2}."
        rational = input_scales(logit_scale, config)[1] * rational_matrix(image_features, text_features)  # (B, K, D)
        projections = layer_projections(offset, rational, parameters, prefix, config)
        offset = offset + project(attend(projections), parameters, f"{prefix}out_proj")  # (B, K, D)
    return offset


def _kept(projections: Projections) -> Projected:
    """Keep the projections for a later call."""
    return Projected(tuple(value.detach() for value in (*projections.queries.values(), *projections[1:])))


def rational_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Parameters,
    config: AdapterConfig,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
    projected: Projected | None = None,
    keep_projected: bool = False,
) -> AdapterOutput:
    """Compute the logits of the adapted model, and where they are asked for the mask penalty and the mask.

        M = act(1 + A),   logits[b, k] = s sum_c M[b, k, c] f[b, c] T[k, c]   (Eq. 4)

    image_features: (B, D); text_features: (K, D); logit_scale: the multiplier s; parameters: published names.
    projected, keep_projected: see ops.rational_adapter.
    """
    scale = as_scale(logit_scale, image_features)  # ()
    projections = None
    if config.mask_function == "attention":
        known = (
            None if projected is None else [value * projected.scale for value in projected.tensors if value is not None]
        )
        projections = rational_projections(image_features, text_features, scale, parameters, config, known=known)
    offset = mask_offset(image_features, text_features, scale, parameters, config, projections)  # (B, K, D)
    mask = rational_mask(offset, config.mask_activation)  # (B, K, D)
    rational = rational_matrix(image_features, text_features)  # (B, K, D)
    return AdapterOutput(
        masked_logits(mask, rational, scale),
        mask_penalty(mask, penalty) if penalty else None,
        mask if return_mask else None,
        _kept(projections) if keep_projected and projections is not None and isinstance(parameters, Mapping) else None,
    )
