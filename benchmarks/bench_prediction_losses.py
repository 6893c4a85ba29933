"""The losses with their gradients against the same equations in plain PyTorch, forward and backward.

At the least, the logits must be read once and their gradient written once. The provider rada_fast goes through
autograd, as the baseline does; "no node" is prediction_loss_and_gradient, which gives the gradient without a backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.timing import Case, Provider
from rada_fast.ops import prediction_loss, prediction_loss_and_gradient, use_backend

ROWS = 6
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def plain_loss(logits: Tensor, kind: str, labels: Tensor | None) -> Tensor:
    if kind == "cross_entropy":
        assert labels is not None
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1) * len(logits)
    log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    if kind == "marginal":
        log_probabilities = log_probabilities.logsumexp(dim=-2) - torch.tensor(float(ROWS)).log()
        return -(log_probabilities.exp() * log_probabilities).sum()
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean(dim=-1).sum()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("classes", [200, 1000])
@pytest.mark.parametrize("episodes", [1, 8, 64])
@pytest.mark.parametrize("kind", ["mean", "marginal", "cross_entropy"])
def test_bench_prediction_losses(
    measured: Callable[[Case], None], compiled_device: str, kind: Any, episodes: int, classes: int, dtype: str
) -> None:
    device = compiled_device
    torch.manual_seed(0)
    logits = (3 * torch.randn(episodes, ROWS, classes, device=device)).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(classes, (episodes, ROWS), device=device) if kind == "cross_entropy" else None
    given: dict[str, Any] = {} if labels is None else {"labels": labels, "label_smoothing": 0.1}

    def plain() -> Tensor:
        (gradient,) = torch.autograd.grad(plain_loss(logits, kind, labels), logits)
        return gradient

    def through_autograd() -> Tensor:
        with use_backend(device):
            (gradient,) = torch.autograd.grad(prediction_loss(logits, kind, **given).sum(), logits)
        return gradient

    def direct() -> Tensor:
        with use_backend(device):
            return prediction_loss_and_gradient(logits, kind, **given)[1]

    calls = {"pytorch": plain, "rada_fast": through_autograd, "no node": direct}
    measured(
        Case(
            name=f"{kind} E={episodes} K={classes} {dtype} {device}",
            device=device,
            providers={name: Provider(call, TOLERANCES[dtype]) for name, call in calls.items()},
            baseline="pytorch",
            expected=plain(),
            least_bytes=2 * logits.nbytes,
        )
    )
