"""Compute losses over predictions; the same pass computes their gradient with respect to the logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rada_fast.errors import BackendUnavailableError
from rada_fast.ops._backends.choice import chosen_backend
from rada_fast.ops._backends.transforms import under_transform
from rada_fast.ops._predictions import check_logits, is_compiled

LossKind = Literal["mean", "marginal", "cross_entropy"]


MAX_CUDA_ROWS = 500
"""The most predictions of one marginal entropy that fit into a block's shared memory; kMostMarginalRows in
csrc/cuda/prediction_losses.h."""


def _is_compiled(logits: Tensor, kind: str) -> bool:
    if kind == "marginal" and logits.is_cuda and logits.shape[-2] > MAX_CUDA_ROWS:
        if chosen_backend() == "cuda":
            raise BackendUnavailableError(
                f"backend 'cuda' cannot serve this call: it takes at most {MAX_CUDA_ROWS} predictions an episode for "
                f"kind 'marginal', got {logits.shape[-2]}"
            )
        return False
    return is_compiled(logits)


def _check(logits: Tensor, kind: str, labels: Tensor | None, label_smoothing: float) -> None:
    check_logits(logits, "(E, n, K) or (n, K) with n >= 1 and K >= 1")
    if kind not in get_args(LossKind):
        raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(LossKind)))}, got {kind!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if kind != "cross_entropy":
        if labels is not None:
            raise ValueError(f"labels belong to kind 'cross_entropy', kind is {kind!r}")
        if label_smoothing:
            raise ValueError(f"label_smoothing belongs to kind 'cross_entropy', kind is {kind!r}")
        return
    if labels is None:
        raise ValueError("labels must be given for kind 'cross_entropy'")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} as the logits are, got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on {logits.device}, got {labels.device}")


def prediction_loss(
    logits: Tensor, kind: LossKind, *, labels: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return one loss for every episode over its n predictions p_i = softmax(logits_i).

        mean:           (1/n) sum_i H(p_i)                      (Eq. 5)
        marginal:       H((1/n) sum_i p_i)
        cross_entropy:  (1/n) sum_i -sum_k t_ik ln p_ik,   t = (1 - a) onehot(label) + a / K,  a = label_smoothing

    with H(p) = -sum_k p_k ln p_k. The forward pass reads the logits once and, if a backward pass may follow, writes the
    gradient beside the loss; the backward pass multiplies it by dlosses[e]. Where that factor is known to be 1,
    prediction_loss_and_gradient saves the multiplication. There is no second derivative.

    logits: (E, n, K), or (n, K) for one episode; float32|float64|bfloat16|float16, n >= 1, K >= 1, any stride. A logit
        of -inf gives its class the probability 0; +inf, NaN and a row of nothing but -inf give NaN.
    kind: "mean", "marginal" or "cross_entropy".
    labels: (E, n), or (n,), int64, for "cross_entropy". Outside 0 to K - 1 they raise IndexError on the CPU and give
        NaN on CUDA, where raising would mean waiting for the device. No label means "ignore this prediction".
    label_smoothing: from 0 to 1, for "cross_entropy".

    Returns losses (E,), or (), in nats: float32, float64 for float64. The gradient has the logits' dtype.
    Raises TypeError or ValueError naming the argument, BackendUnavailableError where a named backend cannot serve.
    Equivalent to ``cross_entropy(logits, labels, label_smoothing=...)`` and ``prediction_entropy(logits).mean()`` of
    each episode.
    """
    _check(logits, kind, labels, label_smoothing)
    batched = logits if logits.ndim == 3 else logits[None]
    targets = labels if labels is None or labels.ndim == 2 else labels[None]
    if _is_compiled(logits, kind):
        keep = torch.is_grad_enabled() and logits.requires_grad
        losses, _ = torch.ops.rada_fast.prediction_loss(batched, kind, targets, label_smoothing, keep)
    else:
        from rada_fast.reference.prediction_losses import prediction_loss as reference

        losses = reference(batched, kind, targets, label_smoothing)
    return losses if logits.ndim == 3 else losses[0]


def prediction_loss_and_gradient(
    logits: Tensor, kind: LossKind, *, labels: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of their sum with respect to the logits, outside autograd.

    The arguments are those of prediction_loss. Returns losses (E,) or () and the gradient, of the logits' shape and
    dtype. ``logits.backward(gradient)`` then continues without a multiplication by ones or a further autograd node.
    """
    _check(logits, kind, labels, label_smoothing)
    batched = logits.detach() if logits.ndim == 3 else logits.detach()[None]
    targets = labels if labels is None or labels.ndim == 2 else labels[None]
    if _is_compiled(logits, kind):
        losses, gradient = torch.ops.rada_fast.prediction_loss(batched, kind, targets, label_smoothing, True)
    else:
        from rada_fast.reference.prediction_losses import prediction_loss as reference

        if under_transform():
            gradient, losses = torch.func.grad(
                lambda values: (lambda each: (each.sum(), each))(reference(values, kind, targets, label_smoothing)),
                has_aux=True,
            )(batched)
            return (losses, gradient) if logits.ndim == 3 else (losses[0], gradient[0])
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors that were created in inference mode take no part in autograd; their copies do.
            leaf = (batched.clone() if batched.is_inference() else batched).requires_grad_()
            losses = reference(leaf, kind, targets, label_smoothing)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach()
    return (losses, gradient) if logits.ndim == 3 else (losses[0], gradient[0])


def unchecked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (1,) and its gradient (B, K), for steps that are repeated with arguments of one form.

    The compiled operator is called directly. logits: (B, K) on the CPU; labels: (B,), int64.
    Equivalent to prediction_loss_and_gradient(logits, "cross_entropy", labels=labels), without its checks.
    """
    with torch._C._AutoDispatchBelowAutograd():
        found: tuple[Tensor, Tensor] = torch.ops.rada_fast.prediction_loss.default(
            logits, "cross_entropy", labels, 0.0, True
        )
    return found
