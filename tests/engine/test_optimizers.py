"""The optimisers of a training take the steps of PyTorch's, go on from a saved state, and follow the learning rate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from rada_fast.engine.optimizers import OnePassOptimizer, set_rate, training_optimizer
from rada_fast.ops import backends

needs_extension = pytest.mark.skipif(backends()["cpu"] != "usable", reason="needs the compiled extension")
OTHERS: dict[str, Any] = {
    "adamw": lambda values: AdamW(values, lr=0.1, weight_decay=0.1, foreach=False),
    "adam": lambda values: Adam(values, lr=0.1, weight_decay=0.1, foreach=False),
    "sgd": lambda values: SGD(values, lr=0.1, weight_decay=0.1, momentum=0.9, foreach=False),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (9,), (), (2, 0))
    ]


def make(values: list[torch.nn.Parameter], name: Any) -> Optimizer:
    return training_optimizer(values, name, lr=0.1, weight_decay=0.1, momentum=0.9)


def take_steps(optimizer: Optimizer, values: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for value in values:
            value.grad = torch.randn(value.shape, generator=generator).to(value.dtype)
        if step < 3:
            values[1].grad = None  # It then has fewer steps behind it than the others.
        set_rate(optimizer, 0.1 / (step + 1))
        optimizer.step()


@needs_extension
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_pass_takes_pytorchs_steps(name: str) -> None:
    ours, other = parameters(), parameters()
    optimizer = make(ours, name)
    assert isinstance(optimizer, OnePassOptimizer)
    take_steps(optimizer, ours, range(6))
    take_steps(OTHERS[name](other), other, range(6))
    for value, expected in zip(ours, other, strict=True):
        # The two round the square roots and the order of two products differently, in each of six steps.
        torch.testing.assert_close(value, expected, rtol=6 * 2**-22, atol=6 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_saved_state_goes_on_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    complete, cut = parameters(dtype), parameters(dtype)
    take_steps(make(complete, name), complete, range(6))
    first = make(cut, name)
    take_steps(first, cut, range(4))
    second = make(cut, name)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, cut, range(4, 6))
    assert all(torch.equal(value, expected) for value, expected in zip(cut, complete, strict=True))


def test_a_rate_that_is_a_tensor_is_written_in_place() -> None:
    (value,) = parameters()[:1]
    optimizer = AdamW([value], lr=torch.tensor(0.5), fused=True)
    rate = optimizer.param_groups[0]["lr"]
    set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25
