"""The rational matrix and its projections (RAda, arXiv:2507.15480, Eq. 2 and the projectors of Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from rada_fast.config.method import ROLES, AdapterConfig, QueryKind

Parameters = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor]
"""Tensors under the published names, or a function that applies the projection of a name to rows."""


class Projections(NamedTuple):
    """Queries by kind, keys and values, split into heads. A query's second-last axis broadcasts over the classes."""

    queries: dict[str, Tensor]  # image (B, H, 1, d), text (1, H, K, d), rational (B, H, K, d)
    keys: Tensor  # (B, H, K, d)
    values: Tensor  # (B, H, K, d)


def rational_matrix(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Compute the rational matrix R[b, k] = f[b] * T[k] (Eq. 2).

    image_features: (B, D), unit norm; text_features: (K, D), unit norm. Returns (B, K, D).
    Equivalent to ``image_features[:, None] * text_features``.
    """
    return image_features[:, None, :] * text_features[None, :, :]  # (B, K, D)


def input_scales(logit_scale: Tensor, config: AdapterConfig) -> tuple[Tensor | float, Tensor | float]:
    """Return the multiplier of the image and text queries and that of the rational matrix.

    They are (sqrt(s), s), or (1, 1) without scaling, and carry no gradient, as in the published code.
    """
    if config.input_scale == "none":
        return 1.0, 1.0
    scale = logit_scale.detach() * config.input_scale_factor  # ()
    return scale.sqrt(), scale


def split_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Split the columns of (N, K, D) into heads. Returns (N, H, K, d)."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (N, H, K, d)


class _KnownProjection(torch.autograd.Function):
    """A linear projection whose result is known, so that only its gradients are computed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return result

    @staticmethod
    def backward(ctx: Any, dresult: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat = dresult.flatten(0, -2)  # (N, D)
        return (
            dresult @ weight if needed[0] else None,
            flat.mT @ rows.flatten(0, -2) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
            None,
        )


def project(rows: Tensor, parameters: Parameters, name: str, known: Tensor | None = None) -> Tensor:
    """Apply one linear projection, with its bias where it has one.

    known: the result, where an earlier call has computed it.
    """
    # The types are a tuple because torch.compile before PyTorch 2.11 does not know a union of types.
    if isinstance(parameters, (FunctionType, MethodType)):
        projected: Tensor = parameters(name, rows)
        return projected
    tensors = cast(Mapping[str, Tensor], parameters)
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if known is not None:
        return cast(Tensor, _KnownProjection.apply(rows, weight, bias, known))
    return linear(rows, weight, bias)


def rational_projections(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    parameters: Parameters,
    config: AdapterConfig,
    *,
    known: Sequence[Tensor] | None = None,
) -> Projections:
    """Compute the queries, keys and values of the first layer (Eq. 6).

        qi[b] = sqrt(s) f[b] Wi^T + bi,  qt[k] = sqrt(s) T[k] Wt^T + bt,  qr[b, k] = s R[b, k] Wr^T + br,
        kk = s R Wk^T + bk,  vv = s R Wv^T + bv

    The image query has one row for each image, as it is the same for every class; all images share the text query.
    image_features: (B, D); text_features: (K, D); logit_scale: ().
    known: the queries, keys and values, split into heads, where an earlier call has computed them; only their gradients
        are those of the parameters then.
    """
    query_scale, rational_scale = input_scales(logit_scale, config)
    rational = rational_scale * rational_matrix(image_features, text_features)  # (B, K, D)
    rows: dict[QueryKind, Callable[[], Tensor]] = {
        "image": lambda: query_scale * image_features[:, None, :],  # (B, 1, D)
        "text": lambda: query_scale * text_features[None, :, :],  # (1, K, D)
        "rational": lambda: rational,  # (B, K, D)
    }
    results = iter(known or ())

    def heads_of(inputs: Tensor, role: str) -> Tensor:
        result = next(results, None)
        merged = None if result is None else result.transpose(-3, -2).flatten(-2)
        return split_heads(project(inputs, parameters, ROLES[role], merged), config.num_heads)

    queries: dict[str, Tensor] = {kind: heads_of(rows[kind](), kind) for kind in config.queries}  # (B | 1, H, 1 | K, d)
    keys, values = heads_of(rational, "key"), heads_of(rational, "value")  # (B, H, K, d)
    return Projections(queries, keys, values)


def layer_projections(
    offset: Tensor, rational: Tensor, parameters: Parameters, prefix: str, config: AdapterConfig
) -> Projections:
    """Compute the query of a layer above the first from the summed mask offset, and keys and values from R (Eq. 16).

    offset: (B, K, D), the sum A_1 + ... + A_{l-1}; rational: (B, K, D), already scaled.
    """
    query, keys, values = (
        split_heads(project(rows, parameters, f"{prefix}{name}"), config.num_heads)  # (B, H, K, d)
        for rows, name in ((offset, "q_proj"), (rational, "k_proj"), (rational, "v_proj"))
    )
    return Projections({"offset": query}, keys, values)


def as_scale(logit_scale: Tensor | float, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the logit scale as a 0-dim tensor on the device of like, in dtype or in the type of like.

    A tensor is on that device already, and keeps its gradient. A number is filled in on the device, because a copy from
    the host would wait for the device, which a CUDA graph forbids.
    """
    if isinstance(logit_scale, Tensor):
        return logit_scale.to(dtype or like.dtype).reshape(())
    return like.new_full((), logit_scale, dtype=dtype or like.dtype)
