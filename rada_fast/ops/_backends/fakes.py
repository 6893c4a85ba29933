"""Fake kernels and gradients of the registered operators, in one list; csrc/ops.cpp holds the schemas.

Shapes: B images, K classes, D wide, H heads; P = K rounded up to 16, the leading dimension of what is kept per class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rada_fast.ops._backends.transforms import refuse_second_derivative

CLASS_PADDING = 16
QUERY_BLOCK = 128
"""kQueryBlock in csrc/cpu/problem.h: queries per tile, one factor each."""
VIEW_COLUMNS = 11
"""kViewColumns in csrc/cpu/view_frames.h: numbers that say what a view is."""

PARAMETERS = tuple(
    f"{role}_{part}" for role in ("image", "text", "rational", "key", "value", "output") for part in ("weight", "bias")
)
"""The operators' parameters in the order of their schemas, after image features, text features and the scale."""

_OPTIONS = 7
_FIRST_PARAMETER = 3


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kept(
    image_features: Tensor, text_features: Tensor, parameters: tuple[Tensor | None, ...], num_heads: int, matrix: bool
) -> tuple[Tensor, ...]:
    batch, (classes, width) = image_features.shape[0], text_features.shape
    padded = (classes + CLASS_PADDING - 1) // CLASS_PADDING * CLASS_PADDING
    blocks = (classes + QUERY_BLOCK - 1) // QUERY_BLOCK
    image, text, rational = (parameters[2 * role] is not None for role in range(3))
    output_weight = parameters[-2]
    assert output_weight is not None
    stored, exact = output_weight.dtype, _exact(output_weight.dtype)
    empty = image_features.new_empty
    return (
        empty((2 + rational, batch, width, padded), dtype=stored),
        empty((text + rational, batch, width, padded), dtype=exact),
        empty((2, batch, num_heads, blocks), dtype=exact),
        empty((2, 2, batch, num_heads, 1 if matrix else padded), dtype=exact),
        empty((2, batch, width if image else 0), dtype=exact),
        empty((width if text else 0, padded), dtype=stored),
    )


def _nothing_kept(image_features: Tensor, stored: torch.dtype) -> tuple[Tensor, ...]:
    empty, exact = image_features.new_empty, _exact(stored)
    return (
        empty((2, 0, 0, 0), dtype=stored),
        empty((0, 0, 0, 0), dtype=exact),
        empty((2, 0, 0, 0), dtype=exact),
        empty((2, 2, 0, 0, 0), dtype=exact),
        empty((2, 0, 0), dtype=exact),
        empty((0, 0), dtype=stored),
    )


def _fake_forward(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters = rest[: len(PARAMETERS)]
    num_heads, _, matrix, _, _, _, _, return_mask, keep = rest[len(PARAMETERS) :]
    (batch, width), classes = image_features.shape, text_features.shape[0]
    empty = image_features.new_empty
    kept = (
        _kept(image_features, text_features, parameters, num_heads, matrix)
        if keep
        else _nothing_kept(image_features, parameters[-2].dtype)
    )
    mask = empty((batch, width, classes) if return_mask else (0,))
    sums = empty((batch, classes), dtype=_exact(parameters[-2].dtype))
    return empty((batch, classes)), empty(()), mask, *kept, empty((batch,), dtype=torch.int64), sums


def _fake_backward(
    dlogits: Tensor | None, dpenalty: Tensor | None, dmask: Tensor | None, image_features: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    text_features, _, *parameters = rest[: 2 + len(PARAMETERS)]
    needed = rest[-1]
    inputs = (image_features, text_features, *parameters)
    exact = _exact(parameters[-2].dtype)
    return tuple(
        torch.empty_like(given, memory_format=torch.contiguous_format)
        if wanted
        else image_features.new_empty((0,), dtype=exact)
        for given, wanted in zip(inputs, needed, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[: _FIRST_PARAMETER + len(PARAMETERS)], inputs[_FIRST_PARAMETER + len(PARAMETERS) :]
    _, _, _, *kept = output
    ctx.options = options[:_OPTIONS]
    ctx.kept = options[-1]
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    # The kept tensors are outputs too; gradients of zeros for them would cost what the op saves.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dlogits: Tensor | None, dpenalty: Tensor | None, dmask: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    if dlogits is None and dpenalty is None and dmask is None:
        return nothing
    count = _FIRST_PARAMETER + len(PARAMETERS)
    saved = ctx.saved_tensors
    inputs, kept, sums = saved[:count], saved[count:-1], saved[-1]
    asked = ctx.needs_input_grad[:count]
    needed = [asked[0], asked[1], *asked[_FIRST_PARAMETER:]]
    gradients: list[Tensor | None] = [None] * len(needed)
    if any(needed):
        if not ctx.kept:
            raise RuntimeError("the forward was told that no gradient follows (keep=False)")
        refuse_second_derivative("rational_adapter")
        result = torch.ops.rada_fast.rational_adapter_backward(
            dlogits, dpenalty, dmask, *inputs, *ctx.options, *kept, needed
        )
        gradients = [value if wanted else None for value, wanted in zip(result, needed, strict=True)]
    dscale = None
    if asked[2] and dlogits is not None:
        # Only the factor in front of the sum carries a gradient; the projections' inputs see s detached.
        dscale = (dlogits.to(sums.dtype) * sums).sum().to(inputs[2].dtype)
    return (gradients[0], gradients[1], dscale, *gradients[2:], *nothing[count:])


def _fake_device_architecture(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int32)


def _fake_select_views(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    episodes, views, _ = logits.shape
    indices = logits.new_empty((episodes, count), dtype=torch.int64)
    return indices, logits.new_empty((episodes, views), dtype=_exact(logits.dtype))


def _fake_prediction_loss(
    logits: Tensor, kind: str, labels: Tensor | None, label_smoothing: float, keep: bool
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty((logits.shape[0],), dtype=_exact(logits.dtype))
    return losses, logits.new_empty(logits.shape if keep else (0,))


def _save_prediction_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dlogits = output
    ctx.kept = inputs[-1]
    ctx.save_for_backward(dlogits)
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)


def _backward_prediction_loss(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 5
    if dlosses is None or not ctx.needs_input_grad[0]:
        return nothing
    if not ctx.kept:
        raise RuntimeError("the forward was told that no gradient follows (keep=False)")
    refuse_second_derivative("prediction_loss")
    (dlogits,) = ctx.saved_tensors
    # In the losses' type: a low-precision factor would round the product twice.
    return ((dlogits * dlosses[:, None, None]).to(dlogits.dtype), *nothing[1:])


def _fake_episodic_optimizer_step(*_: Any) -> None:
    return None


def _fake_crops(
    pictures: list[Tensor], views: Tensor, size: int, mean: Any, std: Any, dtype: torch.dtype, tall_first: bool
) -> Tensor:
    like = pictures[0] if pictures else views
    return like.new_empty((views.shape[0], 3, size, size), dtype=dtype)


def _fake_random_views(height: int, width: int, size: int, count: int, *_: Any) -> Tensor:
    return torch.empty((count, VIEW_COLUMNS), dtype=torch.int64)


def _fake_augmix(
    pictures: list[Tensor],
    views: Tensor,
    operations: Tensor,
    matrices: Tensor,
    weights: Tensor,
    size: int,
    mean: Any,
    std: Any,
    dtype: torch.dtype,
    tall_first: bool,
) -> Tensor:
    return _fake_crops(pictures, views, size, mean, std, dtype, tall_first)


def _fake_random_augmix(
    height: int, width: int, size: int, count: int, scale: Any, ratio: Any, chains: int, depth: int, *_: Any
) -> tuple[Tensor, ...]:
    return (
        torch.empty((count, VIEW_COLUMNS), dtype=torch.int64),
        torch.empty((count, chains, depth), dtype=torch.int64),
        torch.empty((count, chains, depth, 6), dtype=torch.float64),
        torch.empty((count, chains + 2)),
    )


def register() -> None:
    """Register fake kernels and gradients; call once, after the library that defines the schemas is loaded."""
    torch.library.register_fake("rada_fast::rational_adapter", _fake_forward)
    torch.library.register_fake("rada_fast::rational_adapter_backward", _fake_backward)
    torch.library.register_autograd("rada_fast::rational_adapter", _backward, setup_context=_save)
    torch.library.register_fake("rada_fast::device_architecture", _fake_device_architecture)
    torch.library.register_fake("rada_fast::select_views", _fake_select_views)
    torch.library.register_fake("rada_fast::prediction_loss", _fake_prediction_loss)
    torch.library.register_autograd(
        "rada_fast::prediction_loss", _backward_prediction_loss, setup_context=_save_prediction_loss
    )
    torch.library.register_fake("rada_fast::episodic_optimizer_step", _fake_episodic_optimizer_step)
    torch.library.register_fake("rada_fast::multi_view_crops", _fake_crops)
    torch.library.register_fake("rada_fast::random_views", _fake_random_views)
    torch.library.register_fake("rada_fast::augmix", _fake_augmix)
    torch.library.register_fake("rada_fast::random_augmix", _fake_random_augmix)
