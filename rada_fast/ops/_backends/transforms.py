"""Detect what the compiled operators cannot differentiate: function transforms, forward mode, second derivatives."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jacrev, ...) or forward-mode differentiation is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# torch.compile takes the result at the time of tracing as a constant; it guards both states itself.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]

TRANSFORM_REASON = "it serves no transform of torch.func and no forward-mode differentiation; 'reference' does"


def refuse_second_derivative(name: str) -> None:
    """Raise RuntimeError where a gradient would be differentiated again; the autograd formulas call this."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative on a compiled backend, and create_graph=True asks for one; "
            "compute it inside rada_fast.use_backend('reference')"
        )
