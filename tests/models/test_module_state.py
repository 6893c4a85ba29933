"""Every change that PyTorch keeps a record of is noticed, and looking at a module is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rada_fast.models.module_state import ModuleState


class Owner(nn.Module):
    """A module with a part that is watched, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)))
        self.other = nn.Linear(3, 3)
        self.kind = "tok"


def optimize(owner: Any) -> None:
    optimizer = torch.optim.SGD(owner.watched.parameters(), lr=1.0)
    owner.watched.eval()(torch.ones(1, 3)).sum().backward()
    owner.watched.train()
    optimizer.step()


@torch.no_grad()
def write(owner: Any) -> None:
    owner.watched[1][1].bias.add_(1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook": lambda owner: owner.watched[1][1].register_forward_hook(lambda *_: None),
    "a hook before": lambda owner: owner.watched.register_forward_pre_hook(lambda *_: None),
    "a part": lambda owner: owner.watched[1].__setitem__(0, nn.Identity()),
    "one part more": lambda owner: owner.watched[1].append(nn.Identity()),
    "a parameter": lambda owner: setattr(owner.watched[0], "bias", nn.Parameter(torch.zeros(3))),
    "no parameter": lambda owner: setattr(owner.watched[0], "bias", None),
    "memory": lambda owner: setattr(owner.watched[0].bias, "data", torch.zeros(3)),
    "a write": write,
    "a step": optimize,
    "an attribute": lambda owner: setattr(owner.watched[1][0], "p", 0.1),
    "the mode": lambda owner: owner.watched.eval(),
    "a class": lambda owner: setattr(owner.watched[1][0], "__class__", nn.AlphaDropout),
    "a method": lambda owner: setattr(owner.watched[1], "forward", lambda rows: rows),
    "the owner": lambda owner: setattr(owner, "kind", "avg"),
    "the watched part": lambda owner: setattr(owner, "watched", nn.Linear(3, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change: Callable[[Any], object]) -> None:
    owner = Owner().train()
    state = ModuleState(owner.watched, [owner])
    owner.watched(torch.ones(1, 3)).sum().backward()
    owner.other.register_forward_hook(lambda *_: None)
    assert state.is_current()
    change(owner)
    assert not state.is_current()


def test_the_record_does_not_see_writes_to_data() -> None:
    """The docstring of ModuleState says so; if PyTorch ever counts these writes, the sentence can go."""
    owner = Owner()
    state = ModuleState(owner.watched, [owner])
    owner.watched[0].weight.data.zero_()
    assert state.is_current()
