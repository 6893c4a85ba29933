"""A patched adapter checks its forward, settings and inputs, and serves only calls that are as published."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from rada_fast.compat import SimpleMultiheadAttention, patch, unpatch
from tests.compat.published import PublishedAttention, assert_same_as_unpatched, published_rows


class Odd(PublishedAttention):
    """Odd applies a function to the result of the published forward."""

    after: Any = staticmethod(lambda self, offset, rows: offset)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.options = {"factors": [1.0]}

    def forward(self, *rows: Tensor, **named: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        offset, first = super().forward(*rows, **named)
        return self.after(self, offset * self.options["factors"][0], rows), first


def odd(after: Any) -> Any:
    return type("Odd", (Odd,), {"after": staticmethod(after)})(16, 4, 1.0).double().eval()


@pytest.mark.filterwarnings("ignore:rada_fast leaves this adapter to its own forward")
@pytest.mark.parametrize(
    "after",
    [
        lambda self, offset, rows: 3 * offset if len(rows[0]) == 1 else offset,
        lambda self, offset, rows: 3 * offset if rows[0].shape[1] > 4 else offset,
        lambda self, offset, rows: 2 * offset if rows[2].abs().max() > 15 else offset,
        lambda self, offset, rows: nn.functional.dropout(offset, 1e-9),
    ],
    ids=["batch of one", "many classes", "large values", "random numbers"],
)
def test_forwards_that_depend_on_their_inputs_are_noticed(after: Any) -> None:
    module = odd(after)
    own = copy.deepcopy(module)
    patch(module)
    for shape in ((2, 3), (1, 3), (2, 5)):
        assert_same_as_unpatched(module, own, published_rows(*shape))


@pytest.mark.filterwarnings("ignore:rada_fast leaves this adapter to its own forward")
def test_attributes_and_class_attributes_that_change_are_noticed() -> None:
    module = odd(lambda self, offset, rows: offset)
    own = copy.deepcopy(module)
    patch(module)
    rows = published_rows()
    state = torch.get_rng_state()
    assert module(*rows)[1] is None
    assert torch.equal(torch.get_rng_state(), state)
    module.options["factors"][0] = own.options["factors"][0] = 2.0
    assert_same_as_unpatched(module, own, rows)
    module.options["factors"][0] = own.options["factors"][0] = 1.0
    assert module(*rows)[1] is None
    type(own).after = staticmethod(lambda self, offset, rows: 2 * offset)
    assert_same_as_unpatched(module, own, rows)
    module.options["engine"] = object()
    assert module(*rows)[1] is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.dropout.train(),
        lambda module: module.dropout.register_forward_hook(lambda *args: 2 * args[-1]),
        lambda module: setattr(module, "dropout", nn.Tanh()),
        lambda module: setattr(module, "dropout", nn.AlphaDropout(0.001).train()),
        lambda module: setattr(module, "temprature", -1.0),
        lambda module: setattr(module.k_proj, "bias", None),
        lambda module: setattr(module.out_proj, "bias", None),
        lambda module: setattr(module, "out_proj", nn.Linear(16, 8).double()),
    ],
    ids=["training alone", "hook", "tanh", "alpha", "negative", "one bias less", "no output bias", "narrow output"],
)
def test_other_dropouts_biases_and_settings_use_the_modules_forward(change: Any) -> None:
    class Dropping(PublishedAttention):
        def forward(self, *rows: Tensor, **named: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            offset, first = super().forward(*rows, **named)
            return self.dropout(offset), first

    module = Dropping(16, 4, 1.0).double()
    module.dropout = nn.Dropout(0.5)
    module.eval()
    patch(module)
    rows = published_rows()
    assert module(*rows)[1] is None
    change(module)
    own = copy.deepcopy(module)
    unpatch(own)
    with pytest.warns(UserWarning, match="rada_fast leaves this adapter to its own forward: "):
        assert_same_as_unpatched(module, own, rows)


def test_the_drop_in_class_from_features_adds_the_biases_it_has() -> None:
    drop_in = SimpleMultiheadAttention(16, 8, t=1.0).double()
    nn.init.normal_(drop_in.get_parameter("out_proj.weight"))
    drop_in.get_submodule("out_proj").bias = None  # type: ignore[assignment]
    image, text = torch.randn(2, 16).double(), torch.randn(5, 16).double()
    rows = (2 * image[:, None].repeat(1, 5, 1), 2 * text.repeat(2, 1, 1), *[4 * image[:, None] * text] * 3)
    mask = drop_in.forward_features(image, text, 4.0)[1]
    torch.testing.assert_close(mask, torch.relu(1 + drop_in(*rows)[0]), rtol=1e-9, atol=1e-9)


def test_retained_gradients_of_the_inputs_are_those_of_the_module() -> None:
    gradients = []
    module = PublishedAttention(16, 4, 1.0).double()
    twin = copy.deepcopy(module)
    patch(module)
    for one in (module, twin):
        torch.manual_seed(4)
        rows = published_rows()
        image, text = rows[0][:, :1].clone().requires_grad_(), rows[1][:1].clone().requires_grad_()
        product = image * text
        product.retain_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one(image.repeat(1, 5, 1), text.repeat(2, 1, 1), product, product, product)[0].square().sum().backward()
        gradients.append(product.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_recorded_calls_use_the_modules_forward() -> None:
    module = PublishedAttention(16, 4, 1.0).double().requires_grad_(False)
    own = copy.deepcopy(module)
    patch(module)
    others = tuple(torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(5))
    graph = make_fx(lambda *rows: module(*rows)[0])(*published_rows())
    torch.testing.assert_close(graph(*others), own(*others)[0], rtol=1e-9, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates this function
        traced = torch.jit.trace(module, published_rows(), check_trace=False)
    torch.testing.assert_close(traced(*others)[0], own(*others)[0], rtol=1e-9, atol=1e-9)


def test_keys_that_are_almost_the_product_are_not_served() -> None:
    module = PublishedAttention(16, 4, 1.0).bfloat16()
    patch(module)
    rows = published_rows(dtype=torch.bfloat16)
    assert module(*rows)[1] is None
    key = rows[3] + 0.03 * rows[3].abs().max()
    with pytest.warns(UserWarning, match="its keys are not the product"):
        assert module(*rows[:2], key, key, key)[1] is not None
