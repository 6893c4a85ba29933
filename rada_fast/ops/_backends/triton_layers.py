"""Compute an adapter of several layers on CUDA (RAda, arXiv:2507.15480, Eq. 16).

The Triton kernels compute the attention over classes, as an operator of its own; PyTorch computes the products around
it. Only an adapter of a single layer is fused as a whole: a further layer takes its queries from the sum of the offsets
of the layers below it, which has to be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.kernels.class_attention import Attended, class_attention_backward, class_attention_forward
from rada_fast.kernels.rational_projections import ProjectionBuffers
from rada_fast.ops._backends.registration import Layout, define, register_gradient
from rada_fast.ops._backends.transforms import refuse_second_derivative
from rada_fast.reference.rational_adapter import AdapterOutput
from rada_fast.reference.rational_projections import as_scale


class Projected(NamedTuple):
    """Group the queries (B, D), (1, K, D) and (B, K, D), None for a kind not in use, and keys and values (B, K, D)."""

    q_image: Tensor | None
    q_text: Tensor | None
    q_rational: Tensor | None
    keys: Tensor
    values: Tensor


class AttentionOptions(NamedTuple):
    """Hold the options of the attention. precision: how float32 is multiplied (see triton.float32_precision)."""

    num_heads: int
    temperature: float
    matrix_softmax: bool
    precision: str


def _attention(options: AttentionOptions) -> dict[str, Any]:
    """Return the options under the names that the launches use."""
    named = options._asdict()
    return {"matrix": named.pop("matrix_softmax"), **named}


class Rows(NamedTuple):
    """Hold the attention's result with its heads merged, (B, K, D)."""

    attended: Tensor


class RowGradients(NamedTuple):
    """Hold the gradient of the attention's result, (B, K, D)."""

    dattended: Tensor


def _weighted(part: Tensor, factors: Tensor | None, kind: int) -> Tensor:
    """Return the attention's result for one kind of query in float32, (B, K, D), times the factors w if there are any.

    The matrix softmax has a factor w for every query and head, see kernels/class_attention.
    """
    part = part.float()
    if factors is None:
        return part
    by_head = part.unflatten(-1, (factors.shape[1], -1)) * factors[kind].permute(1, 2, 0)[..., None]
    return by_head.flatten(-2)


def _buffers(projected: Projected) -> ProjectionBuffers:
    """Return the projections in the form that the kernels take: contiguous, with the image's query in float32."""
    q_image, q_text, q_rational = projected.q_image, projected.q_text, projected.q_rational
    return ProjectionBuffers(
        keys=projected.keys.contiguous(),
        values=projected.values.contiguous(),
        q_rational=None if q_rational is None else q_rational.contiguous(),
        q_text=None if q_text is None else q_text.contiguous(),
        q_image=None if q_image is None else q_image.float().contiguous(),
    )


def _forward(projected: Projected, options: AttentionOptions) -> tuple[Rows, Attended]:
    keys = projected.keys
    with torch.cuda.device_of(keys):
        attended = class_attention_forward(projections=_buffers(projected), **_attention(options))
    # Two results of an operator cannot be one tensor. An empty one stands for the result that is absent.
    return Rows(attended.combined), replace(attended, combined=keys.new_empty((0,)))


def _forward_fake(projected: Projected, options: AttentionOptions) -> tuple[Rows, Attended]:
    keys, heads, matrix = projected.keys, options.num_heads, options.matrix_softmax
    batch, classes, width = keys.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32, given: bool = True) -> Any:
        return keys.new_empty(shape, dtype=dtype) if given else None

    attended = Attended(
        text=empty(batch, classes, width, dtype=keys.dtype, given=projected.q_text is not None),
        rational=empty(batch, classes, width, dtype=keys.dtype, given=projected.q_rational is not None),
        image=empty(batch, width, given=projected.q_image is not None),
        combined=keys.new_empty((0,)),
        logsums=empty(2, 2, heads, batch, classes),
        image_logsums=empty(2, batch, heads),
        factors=empty(2, heads, batch, classes, given=matrix),
        totals=empty(2, 2, heads, batch, given=matrix),
    )
    return Rows(empty(batch, classes, width, dtype=keys.dtype)), attended


def _backward(
    gradients: RowGradients, projected: Projected, attended: Attended, options: AttentionOptions
) -> tuple[tuple[Tensor | None, ...]]:
    keys, q_image, q_text, heads = projected.keys, projected.q_image, projected.q_text, options.num_heads
    dattended = gradients.dattended.to(keys.dtype).contiguous()
    batch, classes, _ = keys.shape
    # The products dO . w O of every query and head, with O the attention's result of one kind; a head is one chunk.
    deltas = torch.zeros((2, heads, batch, classes), dtype=torch.float32, device=keys.device)
    for kind, part in enumerate((attended.text, attended.rational)):
        if part is not None:
            product = dattended.float() * _weighted(part, attended.factors, kind)
            deltas[kind] = product.unflatten(-1, (heads, -1)).sum(-1).permute(2, 0, 1)
    with torch.cuda.device_of(keys):
        computed = class_attention_backward(
            projections=_buffers(projected),
            attended=attended,
            dattended=dattended,
            deltas=deltas,
            **_attention(options),
        )
    dq_image = None if q_image is None or computed.q_image is None else computed.q_image.to(q_image.dtype)
    dq_text = None
    if q_text is not None and computed.q_text is not None:
        dq_text = computed.q_text.unflatten(0, (len(q_text), -1)).float().sum(1).to(q_text.dtype)
    return ((dq_image, dq_text, computed.q_rational, computed.keys, computed.values),)


def _backward_fake(
    gradients: RowGradients, projected: Projected, attended: Attended, options: AttentionOptions
) -> tuple[tuple[Tensor | None, ...]]:
    return (
        tuple(
            None if value is None else torch.empty_like(value, memory_format=torch.contiguous_format)
            for value in projected
        ),
    )


def _gradients(
    gradients: Sequence[Tensor | None], arguments: list[Any], kept: tuple[Tensor, ...], wanted: list[Any]
) -> Sequence[Any]:
    projected, options = arguments
    refuse_second_derivative("rational_adapter")
    dprojected = torch.ops.rada_fast.class_attention_triton_backward.default(*gradients, *projected, *kept, *options)
    return (dprojected,)


_ARGUMENTS = Layout(Projected, AttentionOptions)
_RESULTS = Layout(Rows, Attended, results=(Rows, Attended))
_function = define("class_attention_triton", _ARGUMENTS, _RESULTS, _forward, _forward_fake)
define(
    "class_attention_triton_backward",
    Layout(RowGradients, Projected, Attended, AttentionOptions, results=(Attended,)),
    Layout(Projected, results=(Projected,), prefix="d"),
    _backward,
    _backward_fake,
)
register_gradient("class_attention_triton", _ARGUMENTS, Layout(Projected), len(Rows._fields), _gradients, _function)


def layered_adapter(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    parameters: Mapping[str, Tensor],
    config: AdapterConfig,
    precision: str,
    *,
    penalty: MaskPenalty | None = None,
    return_mask: bool = False,
) -> AdapterOutput:
    """Compute ops.rational_adapter, with its arguments and results, for any number of layers of attention."""
    scale = as_scale(logit_scale, image_features)
    factor = config.input_scale_factor * scale.detach() if config.input_scale == "logit" else scale.new_ones(())
    rational = image_features[:, None] * text_features  # (B, K, D)
    scaled = factor * rational  # (B, K, D)

    def project(rows: Tensor, name: str) -> Tensor:
        return linear(rows, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    def attend(q_image: Tensor | None, q_text: Tensor | None, q_rows: Tensor | None, prefix: str) -> Tensor:
        keys, values = project(scaled, f"{prefix}k_proj"), project(scaled, f"{prefix}v_proj")  # (B, K, D)
        attended, *_ = torch.ops.rada_fast.class_attention_triton.default(
            *Projected(q_image, q_text, q_rows, keys, values),
            *AttentionOptions(config.num_heads, config.temperature, config.softmax == "matrix", precision),
        )
        return project(attended, f"{prefix}out_proj")  # (B, K, D)

    offset = attend(
        project(factor.sqrt() * image_features, "q_proj1") if "image" in config.queries else None,  # (B, D)
        project(factor.sqrt() * text_features, "q_proj2")[None] if "text" in config.queries else None,  # (1, K, D)
        project(scaled, "q_proj3") if "rational" in config.queries else None,  # (B, K, D)
        "",
    )
    for layer in range(config.num_layers - 1):
        prefix = f"layers.{layer}."
        offset = offset + attend(None, None, project(offset, f"{prefix}q_proj"), prefix)
    mask = 1 + offset  # (B, K, D)
    if config.mask_activation == "relu":
        mask = mask.relu()
    mask = mask.to(image_features.dtype)
    logits = scale * (mask * rational).sum(-1)  # (B, K)
    distance = mask - 1  # (B, K, D)
    amount = None
    if penalty and not len(mask):
        amount = distance.sum()
    elif penalty == "l2":
        amount = distance.square().mean()
    elif penalty == "l1":
        amount = distance.abs().mean()
    elif penalty == "linf":
        amount = distance.abs().flatten(1).max(dim=1).values.mean()
    return AdapterOutput(logits, amount, mask if return_mask else None)
