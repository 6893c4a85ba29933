"""Steps that call the compiled operators directly have the bits of steps through autograd and the optimiser's step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from rada_fast.config.method import AdapterConfig
from rada_fast.engine import direct_steps, steps
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, Totals, TrainingStep
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends

pytestmark = pytest.mark.skipif(backends()["cpu"] != "usable", reason="needs the compiled extension")
SIZES = [1, 1, 3, 1, 5, 1, 2]
"""The images of each step. The step of five has two parts."""


def features(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make(name: Any, penalty_weight: float, *, text_first: bool) -> TrainingStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RationalAdapter(AdapterConfig.official(16))
        torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.1)
    text = torch.nn.Parameter(features(7, 1))
    trained = [text, *adapter.parameters()] if text_first else [*adapter.parameters(), text]
    optimizer = training_optimizer(trained, name, lr=1e-3, weight_decay=0.1, momentum=0.9)
    return TrainingStep(Gradients(adapter, text, 20.0, Objective("l2", penalty_weight)), optimizer, micro_batch=4)


def train(step: TrainingStep, numbers: range) -> None:
    for number in numbers:
        count = SIZES[number]
        step(features(count, 10 + number), torch.arange(count), 1e-3 / (number + 1))


@pytest.mark.parametrize(
    ("name", "penalty_weight", "text_first"),
    [("adamw", 1.5, True), ("adam", 0.0, False), ("sgd", 1.5, False)],
)
def test_direct_steps_have_the_bits_of_others(
    name: str, penalty_weight: float, text_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is also interrupted in the middle, and goes on from the optimiser's state."""
    monkeypatch.setattr(direct_steps, "STEPS_HELD", 2)
    found = make(name, penalty_weight, text_first=text_first)
    assert found._direct is not None
    train(found, range(4))
    halfway = copy.deepcopy(found.optimizer.state_dict())
    weights = [value.detach().clone() for value in found.gradients.trained]
    train(found, range(4, len(SIZES)))
    totals = found.read_totals()

    resumed = make(name, penalty_weight, text_first=text_first)
    train(resumed, range(2))  # Neither the weights nor the state of these steps may be left.
    for value, halfway_value in zip(resumed.gradients.trained, weights, strict=True):
        value.data.copy_(halfway_value)
    resumed.optimizer.load_state_dict(halfway)
    train(resumed, range(4, len(SIZES)))

    monkeypatch.setattr(steps, "direct_step", lambda *arguments: None)
    expected = make(name, penalty_weight, text_first=text_first)
    assert expected._direct is None
    train(expected, range(len(SIZES)))
    for one in (found, resumed):
        pairs = zip(one.gradients.trained, expected.gradients.trained, strict=True)
        assert all(torch.equal(value, other) for value, other in pairs)
    assert tuple(totals) == pytest.approx(tuple(expected.read_totals()), rel=1e-12)
    assert totals.images == sum(SIZES)
    assert found.read_totals() == Totals(0, 0.0, 0.0, 0.0)


def test_others_notice_that_the_weights_have_changed() -> None:
    step = make("adamw", 1.5, text_first=False)
    for number in range(2):
        before = [value._version for value in step.gradients.trained]
        train(step, range(number, number + 1))
        assert all(value._version > old for value, old in zip(step.gradients.trained, before, strict=True))
        assert all(value.grad is None for value in step.gradients.trained)


def test_a_step_calls_four_operators_and_nothing_else() -> None:
    """Each further call, a view of a tensor too, would take longer beside cold caches than some of these operators."""
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.name().removeprefix("rada_fast::"))
            return func(*args, **(kwargs or {}))

    step, one = make("adamw", 1.5, text_first=False), (features(1, 0), torch.tensor([3]), 1e-3)
    step(*one)
    with Calls():
        step(*one)
    assert called == [
        "rational_adapter", "prediction_loss", "rational_adapter_backward", "episodic_optimizer_step"
    ]  # fmt: skip


def test_a_label_that_is_no_class_is_an_error() -> None:
    step = make("adamw", 1.5, text_first=False)
    with pytest.raises(IndexError):
        step(features(1, 0), torch.tensor([7]), 1e-3)
