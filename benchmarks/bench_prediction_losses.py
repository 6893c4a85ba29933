"""Losses with their gradients against their forms in plain PyTorch, forward and backward.

Least to be moved: the logits read once, the gradient written once. rada_fast goes through autograd as the baselines do;
"no node" is prediction_loss_and_gradient, which gives the gradient without a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rada_fast.ops import prediction_loss, prediction_loss_and_gradient, use_backend

from . import interleaved

ROWS = 6


def plain_loss(logits: Tensor, kind: str, labels: Tensor | None) -> Tensor:
    if kind == "cross_entropy":
        assert labels is not None
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1) * len(logits)
    log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    if kind == "marginal":
        log_probabilities = log_probabilities.logsumexp(dim=-2) - torch.tensor(float(ROWS)).log()
        return -(log_probabilities.exp() * log_probabilities).sum()
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean(dim=-1).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [200, 1000])
@pytest.mark.parametrize("episodes", [1, 8, 64])
@pytest.mark.parametrize("kind", ["mean", "marginal", "cross_entropy"])
def test_bench_prediction_losses(
    benchmark: Any,
    kind: Any,
    episodes: int,
    classes: int,
    dtype: torch.dtype,
    small_rows: list[dict[str, Any]],
    compiled_device: str,
) -> None:
    device = compiled_device
    torch.manual_seed(0)
    logits = (3 * torch.randn(episodes, ROWS, classes, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(classes, (episodes, ROWS), device=device) if kind == "cross_entropy" else None
    given = {} if labels is None else {"labels": labels, "label_smoothing": 0.1}

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

    steps: dict[str, Callable[[], Any]] = {"pytorch": plain, "rada_fast": through_autograd, "no node": direct}
    expected = plain().float()
    for step in (through_autograd, direct):
        error = float((step().float() - expected).norm() / expected.norm())
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2), error
    case = f"{kind} E={episodes} K={classes} {str(dtype).removeprefix('torch.')} {device}"
    found = benchmark.pedantic(
        interleaved.measure, args=(case, steps, "pytorch"), kwargs={"least_bytes": 2 * logits.nbytes, "device": device}
    )
    benchmark.extra_info["providers"] = found
    small_rows.extend(found)
