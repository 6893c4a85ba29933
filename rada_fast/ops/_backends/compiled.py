"""Register the result shapes (fakes) and gradients of the compiled library's operators; csrc/ops.cpp has the schemas.

Tensors that the adapter keeps for its backward pass have the number of classes rounded up to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_fast.ops._backends import adapter_operator
from rada_fast.ops._backends.adapter_operator import (
    Features,
    Needed,
    Options,
    Parameters,
    Requests,
    ResultGradients,
    Results,
    Scale,
    Sums,
    empty_gradients,
)
from rada_fast.ops._backends.transforms import refuse_second_derivative

CLASS_PADDING = 16
QUERY_BLOCK = 128
"""The number of queries in a tile, which has factors of its own; kQueryBlock in csrc/cpu/problem.h."""
MERGED_CLASSES, MERGED_HEAD_WIDTH = 1024, 128
"""Where a row softmax of two query kinds has one result; kMergedClasses and kMergedHeadWidth in csrc/cpu/problem.h."""
VIEW_COLUMNS = (
    "picture",
    "top",
    "left",
    "height",
    "width",
    "resized_height",
    "resized_width",
    "window_top",
    "window_left",
    "flip",
    "bicubic",
)
"""The columns of a table of views, int64: the picture's index; the box in the picture; the size to which the box is
resized; the corner of the view's S x S pixels in the resized box; whether the view is mirrored; whether the filter is
bicubic or bilinear. kViewColumns in csrc/shared/view_table.h is their number."""


class CpuOptions(NamedTuple):
    """Hold the options of the operator in C++ alone.

    widened says whether bfloat16 is multiplied as float32; output_is_zero, whether the output projection is known to be
    zero. given_... are what an earlier call with the same features has kept, and given_scale is the factor by which all
    projections but the output's are larger now. Only the forward pass reads them.
    """

    widened: bool
    output_is_zero: bool = False
    given_projections: Tensor | None = None
    given_attended: Tensor | None = None
    given_factors: Tensor | None = None
    given_statistics: Tensor | None = None
    given_image_state: Tensor | None = None
    given_text_query: Tensor | None = None
    given_scale: float = 1.0


class CpuKept(NamedTuple):
    """Group the tensors that are kept for the adapter's backward pass. The axis of classes, if any, is the last."""

    projections: Tensor
    attended: Tensor
    factors: Tensor
    statistics: Tensor
    image_state: Tensor
    text_query: Tensor
    offset: Tensor
    peak: Tensor


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kept(features: Features, parameters: Parameters, options: Options) -> CpuKept:
    batch, (classes, width) = len(features.image_features), features.text_features.shape
    padded = (classes + CLASS_PADDING - 1) // CLASS_PADDING * CLASS_PADDING
    blocks = (classes + QUERY_BLOCK - 1) // QUERY_BLOCK
    weights, heads = parameters.by_role("weight"), options.num_heads
    stored, exact = parameters.output_weight.dtype, _exact(parameters.output_weight.dtype)
    text, rational = "text" in weights, "rational" in weights
    merged = not options.matrix_softmax and text and rational and stored != torch.bfloat16
    merged = merged and classes <= MERGED_CLASSES and width // heads >= MERGED_HEAD_WIDTH
    empty = features.image_features.new_empty
    return CpuKept(
        projections=empty((2 + rational, batch, width, padded), dtype=stored),
        attended=empty((1 if merged else text + rational, batch, width, padded), dtype=exact),
        factors=empty((2, batch, heads, blocks), dtype=exact),
        statistics=empty((2, 2, batch, heads, 1 if options.matrix_softmax else padded), dtype=exact),
        image_state=empty((2, batch, width if "image" in weights else 0), dtype=exact),
        text_query=empty((width if text else 0, padded), dtype=stored),
        offset=empty((batch if classes <= 2 * width else 0, width, padded), dtype=exact),
        peak=empty((batch,), dtype=torch.int64),
    )


def _nothing_kept(features: Features, parameters: Parameters) -> CpuKept:
    stored, exact = parameters.output_weight.dtype, _exact(parameters.output_weight.dtype)
    empty = features.image_features.new_empty
    return CpuKept(
        projections=empty((2, 0, 0, 0), dtype=stored),
        attended=empty((0, 0, 0, 0), dtype=exact),
        factors=empty((2, 0, 0, 0), dtype=exact),
        statistics=empty((2, 2, 0, 0, 0), dtype=exact),
        image_state=empty((2, 0, 0), dtype=exact),
        text_query=empty((0, 0), dtype=stored),
        offset=empty((0, 0, 0), dtype=exact),
        peak=empty((len(features.image_features),), dtype=torch.int64),
    )


def _fake_adapter(
    features: Features, scale: Scale, parameters: Parameters, options: Options, own: CpuOptions, requests: Requests
) -> tuple[Results, CpuKept, Sums]:
    batch, (classes, width) = len(features.image_features), features.text_features.shape
    empty = features.image_features.new_empty
    mask = empty((batch, width, classes) if requests.return_mask else (0,))
    sums = empty((batch, classes), dtype=_exact(parameters.output_weight.dtype))
    kept = _kept(features, parameters, options) if requests.keep else _nothing_kept(features, parameters)
    return Results(empty((batch, classes)), empty(()), mask), kept, Sums(sums)


def _fake_adapter_backward(
    gradients: ResultGradients,
    features: Features,
    scale: Scale,
    parameters: Parameters,
    options: Options,
    own: CpuOptions,
    kept: CpuKept,
    needed: Needed,
) -> tuple[Features, Parameters]:
    absent = features.image_features.new_empty((0,), dtype=_exact(parameters.output_weight.dtype))
    return empty_gradients(features, parameters, needed.needed, absent)


def _fake_device_architecture(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int32)


def _fake_encoder_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    return queries.new_empty(queries.shape)


def _fake_small_transformer(images: Tensor, weights: list[Tensor], width: int, *_: Any) -> Tensor:
    return images.new_empty((images.shape[0], width))


def _fake_select_views(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    episodes, views, _ = logits.shape
    indices = logits.new_empty((episodes, count), dtype=torch.int64)
    return indices, logits.new_empty((episodes, views), dtype=_exact(logits.dtype))


def _fake_prediction_loss(
    logits: Tensor, kind: str, labels: Tensor | None, label_smoothing: float, keep: bool
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty((logits.shape[0] if logits.ndim == 3 else 1,), dtype=_exact(logits.dtype))
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
    # The product is in the losses' type: with a low-precision factor it would be rounded twice.
    of_rows = dlosses if dlogits.ndim == 2 else dlosses[:, None, None]
    return ((dlogits * of_rows).to(dlogits.dtype), *nothing[1:])


def _fake_episodic_optimizer_step(*_: Any) -> None:
    return None


def _fake_crops(
    pictures: list[Tensor], views: Tensor, size: int, mean: Any, std: Any, dtype: torch.dtype, tall_first: bool
) -> Tensor:
    like = pictures[0] if pictures else views
    return like.new_empty((views.shape[0], 3, size, size), dtype=dtype)


def _fake_random_views(height: int, width: int, size: int, count: int, *_: Any) -> Tensor:
    return torch.empty((count, len(VIEW_COLUMNS)), dtype=torch.int64)


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
        torch.empty((count, len(VIEW_COLUMNS)), dtype=torch.int64),
        torch.empty((count, chains, depth), dtype=torch.int64),
        torch.empty((count, chains, depth, 6), dtype=torch.float64),
        torch.empty((count, chains + 2)),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "device_architecture": _fake_device_architecture,
    "encoder_attention": _fake_encoder_attention,
    "small_transformer": _fake_small_transformer,
    "select_views": _fake_select_views,
    "prediction_loss": _fake_prediction_loss,
    "episodic_optimizer_step": _fake_episodic_optimizer_step,
    "multi_view_crops": _fake_crops,
    "random_views": _fake_random_views,
    "augmix": _fake_augmix,
    "random_augmix": _fake_random_augmix,
}


def register() -> None:
    """Register fakes and gradients; call it once, after the library that defines the schemas is loaded."""
    adapter_operator.register(
        "rational_adapter", CpuOptions, [CpuKept], fake=_fake_adapter, fake_backward=_fake_adapter_backward
    )
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"rada_fast::{name}", fake)
    torch.library.register_autograd(
        "rada_fast::prediction_loss", _backward_prediction_loss, setup_context=_save_prediction_loss
    )
