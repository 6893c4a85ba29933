"""Several layers (RAda, arXiv:2507.15480, Eq. 16) on CUDA: attention over classes by the Triton kernels, as an operator
of its own, between PyTorch's own products.

Only one layer is fused as a whole; a layer above asks with the sum of the offsets below, which has to be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rada_fast.config.method import AdapterConfig, MaskPenalty
from rada_fast.kernels.class_attention import Attended, class_attention_backward, class_attention_forward
from rada_fast.kernels.rational_projections import ProjectionBuffers
from rada_fast.ops._backends.transforms import refuse_second_derivative
from rada_fast.reference.rational_adapter import AdapterOutput
from rada_fast.reference.rational_projections import as_scale

_INPUTS = "Tensor? q_image, Tensor? q_text, Tensor? q_rational, Tensor keys, Tensor values"
_OPTIONS = "int heads, float temperature, bool matrix, str precision"
_KEPT = (
    "Tensor text, Tensor rational, Tensor image, Tensor logsums, Tensor image_logsums, Tensor factors, Tensor totals"
)

_library = torch.library.Library("rada_fast", "FRAGMENT")
_library.define(f"class_attention_triton({_INPUTS}, {_OPTIONS}) -> (Tensor attended, {_KEPT})")
_library.define(
    f"class_attention_triton_backward(Tensor dattended, {_INPUTS}, {_KEPT}, {_OPTIONS}) -> "
    "(Tensor dq_image, Tensor dq_text, Tensor dq_rational, Tensor dkeys, Tensor dvalues)"
)


def _absent(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty((0,)) if value is None else value


def _given(value: Tensor) -> Tensor | None:
    return None if value.ndim == 1 and value.numel() == 0 else value


def _weighted(part: Tensor, factors: Tensor | None, kind: int) -> Tensor:
    """w O of one kind, in float32: (B, K, D)."""
    part = part.float()
    if factors is None:
        return part
    by_head = part.unflatten(-1, (factors.shape[1], -1)) * factors[kind].permute(1, 2, 0)[..., None]
    return by_head.flatten(-2)


def _forward(
    q_image: Tensor | None, q_text: Tensor | None, q_rational: Tensor | None, keys: Tensor, values: Tensor,
    heads: int, temperature: float, matrix: bool, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = [None if value is None else value.contiguous() for value in (q_rational, q_text)]
    image = None if q_image is None else q_image.float().contiguous()
    made = ProjectionBuffers(keys.contiguous(), values.contiguous(), *given, image)
    with torch.cuda.device_of(keys):
        seen = class_attention_forward(
            made, num_heads=heads, temperature=temperature, matrix=matrix, precision=precision
        )
    total = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
    for kind, part in enumerate((seen.text, seen.rational)):
        if part is not None:
            total += _weighted(part, seen.factors, kind)
    if seen.image is not None:
        total += seen.image[:, None]
    kinds = sum(value is not None for value in (q_image, q_text, q_rational))
    kept = (seen.text, seen.rational, seen.image, seen.logsums, seen.image_logsums, seen.factors, seen.totals)
    return (total / kinds).to(keys.dtype), *(_absent(value, keys) for value in kept)


def _forward_fake(
    q_image: Tensor | None, q_text: Tensor | None, q_rational: Tensor | None, keys: Tensor, values: Tensor,
    heads: int, temperature: float, matrix: bool, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, classes, width = keys.shape
    wide, exact = (batch, classes, width), torch.float32
    both = ((2, heads, batch, classes), exact)
    shapes: list[tuple[Any, torch.dtype] | None] = [
        (wide, keys.dtype),
        (wide, keys.dtype) if q_text is not None else None,
        (wide, keys.dtype) if q_rational is not None else None,
        ((batch, width), exact) if q_image is not None else None,
        both,
        ((batch, heads), exact),
        both if matrix else None,
        ((2, heads, batch), exact) if matrix else None,
    ]
    return tuple(keys.new_empty((0,)) if one is None else keys.new_empty(one[0], dtype=one[1]) for one in shapes)


def _backward_op(
    dattended: Tensor, q_image: Tensor | None, q_text: Tensor | None, q_rational: Tensor | None, keys: Tensor,
    values: Tensor, text: Tensor, rational: Tensor, image: Tensor, logsums: Tensor, image_logsums: Tensor,
    factors: Tensor, totals: Tensor, heads: int, temperature: float, matrix: bool, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = [None if value is None else value.contiguous() for value in (q_rational, q_text)]
    made = ProjectionBuffers(
        keys.contiguous(), values.contiguous(), *given, None if q_image is None else q_image.float().contiguous()
    )
    seen = Attended(
        _given(text), _given(rational), _given(image), logsums, image_logsums, _given(factors), _given(totals)
    )
    dattended = dattended.to(keys.dtype).contiguous()
    batch, classes, _ = keys.shape
    # A head's dO . w O^c of every query: one chunk for each head.
    deltas = torch.zeros((2, heads, batch, classes), dtype=torch.float32, device=keys.device)
    for kind, part in enumerate((seen.text, seen.rational)):
        if part is not None:
            product = dattended.float() * _weighted(part, seen.factors, kind)
            deltas[kind] = product.unflatten(-1, (heads, -1)).sum(-1).permute(2, 0, 1)
    with torch.cuda.device_of(keys):
        inward = class_attention_backward(
            made, seen, dattended, deltas, num_heads=heads, temperature=temperature, matrix=matrix, precision=precision
        )
    dimage = None if q_image is None or inward.q_image is None else inward.q_image.to(q_image.dtype)
    dtext = None
    if q_text is not None and inward.q_text is not None:
        dtext = inward.q_text.unflatten(0, (len(q_text), -1)).float().sum(1).to(q_text.dtype)
    found = (dimage, dtext, inward.q_rational, inward.keys, inward.values)
    return tuple(_absent(value, keys) for value in found)


def _backward_fake(dattended: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    keys = rest[3]
    return tuple(
        keys.new_empty((0,)) if value is None else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value in rest[:5]
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *kept = output
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dattended: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dattended is None:
        return (None,) * 9
    refuse_second_derivative("rational_adapter")
    saved = ctx.saved_tensors
    result = torch.ops.rada_fast.class_attention_triton_backward(dattended, *saved, *ctx.options)
    found = [value if asked else None for value, asked in zip(result, ctx.needs_input_grad[:5], strict=True)]
    return (*found, None, None, None, None)


for _key in ("CPU", "CUDA"):
    _library.impl("class_attention_triton", _forward, _key)
    _library.impl("class_attention_triton_backward", _backward_op, _key)
torch.library.register_fake("rada_fast::class_attention_triton", _forward_fake)
torch.library.register_fake("rada_fast::class_attention_triton_backward", _backward_fake)
torch.library.register_autograd("rada_fast::class_attention_triton", _backward, setup_context=_save)


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
    """Arguments and results as ops.rational_adapter, for any number of layers of attention."""
    scale = as_scale(logit_scale, image_features)
    factor = config.input_scale_factor * scale.detach() if config.input_scale == "logit" else scale.new_ones(())
    rational = image_features[:, None] * text_features  # (B, K, D)
    scaled = factor * rational  # (B, K, D)

    def project(rows: Tensor, name: str) -> Tensor:
        return linear(rows, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    def attend(q_image: Tensor | None, q_text: Tensor | None, q_rows: Tensor | None, prefix: str) -> Tensor:
        keys, values = project(scaled, f"{prefix}k_proj"), project(scaled, f"{prefix}v_proj")  # (B, K, D)
        attended, *_ = torch.ops.rada_fast.class_attention_triton(
            q_image, q_text, q_rows, keys, values, config.num_heads, config.temperature, config.softmax == "matrix",
            precision,
        )  # fmt: skip
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
    match penalty if len(mask) else None:
        case "l2":
            amount = distance.square().mean()
        case "l1":
            amount = distance.abs().mean()
        case "linf":
            amount = distance.abs().flatten(1).max(dim=1).values.mean()
    if penalty and not len(mask):
        amount = distance.sum()
    return AdapterOutput(logits, amount, mask if return_mask else None)
