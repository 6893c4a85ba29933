"""A patched module that differs from the published one, at once or later, computes what its own forward does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rada_fast.compat import patch, unpatch
from tests.compat.published import (
    PublishedAttention,
    assert_same_as_unpatched,
    published_rows,
)


class LowRank(nn.Linear):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + rows @ self.down.T @ self.up.T


class NoLinear(nn.Module):
    """NoLinear replaces an nn.Linear by another module, as peft does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.term = layer, nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.base_layer(rows) + self.term(rows)
        return result


class Gated(PublishedAttention):
    """Gated is a subclass that computes the same as the published module until its gate is not zero."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, *rows: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        offset, first = super().forward(*rows, **kwargs)
        return offset + self.gate * rows[0], first


class Doubling(PublishedAttention):
    def forward(self, *rows: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        offset, first = super().forward(*rows, **kwargs)
        return 2 * offset, first


class Switched(PublishedAttention):
    """Switched computes something that depends on a setting, which changes later, and on training."""

    factor = 1.0

    def forward(self, *rows: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        offset, first = super().forward(*rows, **kwargs)
        return self.factor * (3 if self.training else 1) * offset, first


def replace(name: str, kind: Any) -> Any:
    return lambda module: setattr(module, name, kind(getattr(module, name)).to(torch.float64))


CHANGES: dict[str, Any] = {
    "low-rank subclass": replace("k_proj", LowRank),
    "low-rank query": replace("q_proj1", LowRank),
    "no linear layer": replace("k_proj", NoLinear),
    "forward hook": lambda module: module.v_proj.register_forward_hook(lambda *args: 2 * args[-1]),
    "pre-hook": lambda module: module.v_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "backward hook": lambda module: module.out_proj.register_full_backward_hook(lambda *args: (2 * args[1][0],)),
    "backward pre-hook": lambda module: module.out_proj.register_full_backward_pre_hook(lambda _, g: (2 * g[0],)),
    "forward on the instance": lambda module: setattr(module.v_proj, "forward", torch.tanh),
    "another child": lambda module: module.add_module("norm", nn.LayerNorm(16)),
    "a buffer": lambda module: module.register_buffer("shift", torch.ones(16)),
    "a tensor": lambda module: setattr(module, "shift", torch.ones(16)),
    "dropout": lambda module: setattr(module.dropout, "p", 0.5),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_computes_what_its_own_forward_does(change: str, when: str) -> None:
    torch.manual_seed(0)
    module = PublishedAttention(16, 4, 1.0).double()
    rows = published_rows()
    if when == "after":
        patch(module)
        assert module(*rows)[1] is None  # the op serves it before the change
    torch.manual_seed(1)
    CHANGES[change](module)
    if when == "before":
        assert patch(module) == [""]
    own = copy.deepcopy(module)
    unpatch(own)
    with pytest.warns(UserWarning, match="rada_fast leaves this adapter to its own forward: "):
        assert_same_as_unpatched(module, own, rows)
    assert_same_as_unpatched(module, own, rows)  # it warns only once


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrised_projections_are_served(norm: str) -> None:
    module = PublishedAttention(16, 4, 1.0).double().eval()
    getattr(nn.utils.parametrizations, norm)(module.k_proj)
    own = copy.deepcopy(module)
    patch(module)
    rows = published_rows()
    assert module(*rows)[1] is None
    assert_same_as_unpatched(module, own, rows)


@pytest.mark.parametrize("kind", [Gated, Doubling])
def test_a_subclass_with_its_own_forward_keeps_it(kind: type) -> None:
    module = kind(16, 4, 1.0).double()
    nn.init.zeros_(module.out_proj.weight)  # with the published adapter's initial zeros, all forwards give the same
    nn.init.zeros_(module.out_proj.bias)
    patch(module)
    rows = published_rows()
    with pytest.warns(UserWarning, match=r"it holds gate|its own forward computes something else"):
        module(*rows)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    own = copy.deepcopy(module)
    unpatch(own)
    assert_same_as_unpatched(module, own, rows)


def test_settings_that_change_later_are_noticed() -> None:
    module = Switched(16, 4, 1.0).double().eval()
    patch(module)
    rows = published_rows()
    assert module(*rows)[1] is None
    own = copy.deepcopy(module)
    unpatch(own)
    module.factor = own.factor = 2.0
    with pytest.warns(UserWarning, match="its own forward computes something else"):
        assert_same_as_unpatched(module, own, rows)
    module.factor = own.factor = 1.0
    assert_same_as_unpatched(module, own, rows)
    assert module(*rows)[1] is None
    assert_same_as_unpatched(module.train(), own.train(), rows)
    module.temprature = own.temprature = 0.5  # the op knows this setting
    assert_same_as_unpatched(module.eval(), own.eval(), rows)
    assert module(*rows)[1] is None


def test_a_forward_replaced_on_the_instance_or_the_class_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = PublishedAttention(16, 4, 1.0).double()
    replaced.forward = lambda *rows: (rows[0], rows[1])  # type: ignore[method-assign,assignment]
    with pytest.warns(UserWarning, match="leaves the adapter '' to its own forward: it was replaced on the instance"):
        assert patch(replaced) == []
    rows = published_rows()
    assert torch.equal(replaced(*rows)[0], rows[0])

    later = PublishedAttention(16, 4, 1.0).double()
    patch(later)
    assert later(*rows)[1] is None
    monkeypatch.setattr(PublishedAttention, "forward", lambda self, *rows: (rows[0], rows[1]))
    with pytest.warns(UserWarning, match="its own forward computes something else"):
        assert torch.equal(later(*rows)[0], rows[0])
