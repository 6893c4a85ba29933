"""Take one step of Adam, AdamW or SGD on one tensor, in the order of torch.optim's single-tensor form."""

from __future__ import annotations

import torch
from torch import Tensor


def episodic_optimizer_step(
    parameter: Tensor,
    gradient: Tensor | None,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    *,
    rule: str,
    step: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the parameter and its moments after one step. The arguments are not changed.

    parameter: any shape and floating type; gradient: of a shape that broadcasts with it, None for exactly zero.
    first_moment, second_moment: None for zero. step: counted from 1. SGD's first moment is its momentum buffer.

    Returns (parameter, first moment, second moment); a moment that the rule does not keep is None.
    """
    grad = torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
    parameter, grad = (value.clone() for value in torch.broadcast_tensors(parameter, grad))
    if rule == "adamw" and weight_decay != 0:
        parameter.mul_(1 - lr * weight_decay)
    elif weight_decay != 0:
        grad = grad.add(parameter, alpha=weight_decay)
    if rule == "sgd":
        if momentum == 0:
            return parameter.add_(grad, alpha=-lr), None, None
        buffer = grad if first_moment is None else first_moment.mul(momentum).add_(grad)
        return parameter.add_(buffer, alpha=-lr), buffer, None

    beta1, beta2 = betas
    zeros = parameter.new_zeros(parameter.shape)
    first = (zeros if first_moment is None else first_moment).lerp(grad, 1 - beta1)
    second = (zeros if second_moment is None else second_moment).mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return parameter.addcdiv_(first, denominator, value=-step_size), first, second
