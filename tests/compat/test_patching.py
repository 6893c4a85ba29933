"""A patched published model computes the same as before, and calls that the op cannot serve go to the module."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from rada_fast.compat import SimpleMultiheadAttention, patch, unpatch
from rada_fast.errors import UserError
from tests.compat.published import (
    NAMES,
    PublishedAttention,
    assert_same_as_unpatched,
    model_of,
    published_rows,
    small_model,
)


@pytest.mark.parametrize("name", ["small_d64", "medium_d128", "hot_d64"])
def test_a_patched_model_gives_the_published_logits_and_gradients(name: str) -> None:
    model, arrays = model_of(name, torch.float64)
    assert patch(model) == ["mha"]
    logits, entropy, linf = model(arrays["image"].double(), arrays["label"], training=True)
    (entropy + 0.5 * linf).backward()
    assert (logits - arrays["logits"]).abs().max() <= 1e-9
    for key, parameter in model.mha.named_parameters():
        expected = arrays[f"grad.{key}"].double()
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= 1e-7 * expected.norm(), key


def test_patching_keeps_parameters_and_the_optimiser_and_unpatching_restores() -> None:
    model = small_model(torch.float32)
    image, label = torch.randn(3, 16), torch.tensor([0, 1, 2])
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.mha.parameters(), lr=1e-3)
    twin_optimizer = torch.optim.AdamW(twin.mha.parameters(), lr=1e-3)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert patch(model) == ["mha"]
    assert patch(model) == ["mha"]
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.state_dict().keys() == twin.state_dict().keys()
    for trained, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        _, entropy, linf = trained(image, label, training=True)
        (entropy + linf).backward()
        its_optimizer.step()
    torch.testing.assert_close(model(image), twin(image), rtol=1e-3, atol=1e-3)
    patched = model(image)
    assert unpatch(model) == ["mha"]
    assert unpatch(model) == []
    assert "forward" not in model.mha.__dict__
    torch.testing.assert_close(model(image), patched, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_features() -> None:
    # The prompt-tuning variants train through the features, so that both inputs must get the whole gradient.
    model = small_model()
    gradients = []
    for patched in (False, True):
        if patched:
            patch(model)
        image = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16).requires_grad_()
        text = model.class_features.clone().requires_grad_()
        model.class_features, kept = text, model.class_features
        gradients.append(torch.autograd.grad(model(image).square().sum(), (image, text)))
        model.class_features = kept
    for plain, through_patch in zip(*gradients, strict=True):
        torch.testing.assert_close(through_patch, plain, rtol=1e-8, atol=1e-8)


def test_inputs_of_another_form_are_left_to_the_module_with_a_warning() -> None:
    attention = PublishedAttention(16, 4, 1.0).double()
    rows = [torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(5)]
    expected = attention(*rows)[0]
    patch(attention)
    with pytest.warns(UserWarning, match="its queries are not one row per image"):
        actual = attention(*rows)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(attention(*rows)[0], expected)  # it warns only once


def test_an_attention_mask_and_dropout_are_left_to_the_module() -> None:
    attention = SimpleMultiheadAttention(16, 4, t=1.0, dropout=0.5)
    patch(attention)
    image, text = torch.randn(2, 1, 16), torch.randn(1, 5, 16)
    rational = image * text
    arguments = (image.repeat(1, 5, 1), text.repeat(2, 1, 1), rational, rational, rational)
    with pytest.warns(UserWarning, match="dropout is active"):
        attention(*arguments)
    attention.eval()
    assert attention(*arguments)[1] is None
    assert attention(*arguments, attn_mask=torch.zeros(5, 5))[1] is not None


def test_the_query_key_variant_is_served() -> None:
    class QueryKey(PublishedAttention):
        def forward(self, query1: Tensor, query2: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(query1, query2, key, key, value)

    attention = QueryKey(16, 4, 1.0, first="q_proj").double()
    image, text = torch.randn(2, 1, 16).double(), torch.randn(1, 5, 16).double()
    arguments = (image.repeat(1, 5, 1), text.repeat(2, 1, 1), image * text, image * text)
    expected = attention(*arguments)[0]
    assert patch(attention) == [""]
    torch.testing.assert_close(attention(*arguments)[0], expected, rtol=1e-10, atol=1e-12)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(UserError, match=r"model must hold a published rational adapter .*, Linear has none"):
        patch(nn.Linear(2, 2))


def test_every_call_is_checked() -> None:
    module = PublishedAttention(16, 4, 1.0).double()
    own = copy.deepcopy(module)
    patch(module)
    assert_same_as_unpatched(module, own, published_rows(1))
    assert module(*published_rows(1))[1] is None
    image, text = torch.randn(4, 1, 16).double(), torch.randn(4, 5, 16).double()
    conditioned = (image.repeat(1, 5, 1), text, *[image * text for _ in range(3)])
    with pytest.warns(UserWarning, match="not one row per image and one row per class"):
        assert_same_as_unpatched(module, own, conditioned)
    for position in range(5):
        rows = list(published_rows(3))
        rows[position] = rows[position].clone()
        rows[position][1, 2, 3] += 1e-3
        assert_same_as_unpatched(module, own, tuple(rows))
        rows[position][1, 2, 3] = torch.nan
        assert bool(module(*rows)[0].isnan().any())
    assert_same_as_unpatched(module, own, published_rows(3))
    assert module(*published_rows(3))[1] is None
    # Where one image's values are far smaller than the others', its own rows decide.
    rows = list(published_rows(2))
    for position, factor in ((0, 1e-6), (2, 1e-6), (3, 1e-6), (4, 1e-6)):
        rows[position][0] *= factor
    rows[3][0, 0, 0] *= 1.5
    assert_same_as_unpatched(module, own, tuple(rows))


@pytest.mark.parametrize(
    "way", ["published", "text detached", "keys detached", "queries detached", "another leaf", "scale trained"]
)
@pytest.mark.parametrize("leaf", ["image", "text", "both"])
def test_gradients_reach_the_inputs_as_they_do_without_patching(way: str, leaf: str) -> None:
    torch.manual_seed(2)
    module = PublishedAttention(16, 4, 1.0).double()
    patched = copy.deepcopy(module)
    patch(patched)
    start = [torch.randn(3, 16).double(), torch.randn(5, 16).double(), torch.tensor(10.0).double()]

    def gradients(adapter: nn.Module) -> list[Tensor | None]:
        image, text, scale = (value.clone() for value in start)
        image.requires_grad_(leaf != "text")
        text.requires_grad_(leaf != "image")
        scale.requires_grad_(way == "scale trained")
        unit_image = (image / image.norm(dim=-1, keepdim=True)).unsqueeze(1)
        unit_text = (text / text.norm(dim=-1, keepdim=True)).unsqueeze(0)
        queries = [scale.sqrt() * unit_image.repeat(1, 5, 1), scale.sqrt() * unit_text.repeat(3, 1, 1)]
        rational = unit_image * (unit_text.detach() if way == "text detached" else unit_text)
        if way == "another leaf":
            rational = (1 * unit_image.relu() - (-unit_image).relu()) * (unit_text + 0)
        keys = [scale * rational for _ in range(3)]
        if way == "keys detached":
            keys = [key.detach() for key in keys]
        if way == "queries detached":
            queries = [query.detach() for query in queries]
        adapter(*queries, *keys)[0].square().sum().backward()
        return [image.grad, text.grad, scale.grad]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual, expected = gradients(patched), gradients(module)
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_the_published_flow_of_gradients_is_served_without_a_warning() -> None:
    model = small_model()
    patch(model)
    image = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    model.class_features = model.class_features.clone().requires_grad_()
    served = []
    model.mha.register_forward_hook(lambda *kwargs: served.append(kwargs[-1][1] is None))
    model(image).sum().backward()
    assert served == [True]


@pytest.mark.parametrize("copier", ["deepcopy", "copy", "pickle", "replica"])
def test_copies_are_patched_and_compute_with_their_own_parameters(copier: str) -> None:
    module = PublishedAttention(16, 4, 1.0).double()
    patch(module)
    rows = published_rows()
    module(*rows)
    match copier:
        case "deepcopy":
            twin: Any = copy.deepcopy(module)
        case "copy":
            twin = copy.copy(module)
            twin._modules = copy.deepcopy(module._modules)
        case "pickle":
            twin = pickle.loads(pickle.dumps(module))
        case _:
            twin = module._replicate_for_data_parallel()
            for name in NAMES:
                layer = getattr(module, name)._replicate_for_data_parallel()
                for leaf, value in getattr(module, name).named_parameters():
                    setattr(layer, leaf, value.detach().clone())
                twin._modules[name] = layer
    before = module(*rows)[0]
    with torch.no_grad():
        twin.v_proj.weight.mul_(2)
    torch.testing.assert_close(module(*rows)[0], before, rtol=0, atol=0)
    own = PublishedAttention(16, 4, 1.0).double()
    own.load_state_dict({f"{n}.{leaf}": getattr(getattr(twin, n), leaf) for n in NAMES for leaf in ("weight", "bias")})
    torch.testing.assert_close(twin(*rows)[0], own(*rows)[0], rtol=1e-9, atol=1e-10)
    assert twin(*rows)[1] is None
    assert isinstance(twin, PublishedAttention)
    assert type(twin).__name__ == "PublishedAttention"


def test_compiled_and_transformed_calls_use_the_modules_forward() -> None:
    module = PublishedAttention(16, 4, 1.0).double()
    rows = published_rows()
    expected = module(*rows)[0]
    patch(module)
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        actual = torch.compile(module, backend=backend, fullgraph=True)(*rows)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()
    batched = torch.func.vmap(lambda *one: module(*(row[None] for row in one))[0][0])(*rows)
    torch.testing.assert_close(batched, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_close_and_keeps_the_type(dtype: torch.dtype, autocast: bool) -> None:
    module = PublishedAttention(16, 4, 1.0)
    exact = module(*published_rows(dtype=torch.float32))[0].detach().abs().max()
    module = module if autocast else module.to(dtype)
    own = copy.deepcopy(module)
    patch(module)
    rows = published_rows(dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        actual, expected = module(*rows)[0], own(*rows)[0]
        assert module(*rows)[1] is None
    assert actual.dtype == expected.dtype == dtype
    assert float((actual - expected).detach().abs().max()) <= 8 * torch.finfo(dtype).eps * max(1.0, float(exact))


def test_calls_without_values_use_the_modules_forward() -> None:
    module = PublishedAttention(16, 4, 1.0).double().to("meta")
    patch(module)
    with pytest.warns(UserWarning, match="the values of its inputs cannot be compared"):
        offset, first = module(*(row.to("meta") for row in published_rows()))
    assert offset.shape == (2, 5, 16)
    assert first is not None
    module = PublishedAttention(16, 4, 1.0).double()
    patch(module)
    rows = published_rows()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.warns(UserWarning, match="cannot be compared"):
        assert module(*(mode.from_tensor(row) for row in rows))[0].shape == (2, 5, 16)
    # The patched model still works afterwards.
    assert module(*rows)[1] is None


@pytest.mark.parametrize("form", ["expanded", "one key", "by name", "inference mode"])
def test_every_form_of_the_published_call_is_served(form: str) -> None:
    module = PublishedAttention(16, 4, 1.0).double()
    own = copy.deepcopy(module)
    patch(module)
    rows = published_rows()
    image, text = rows[0][:, :1], rows[1][:1]
    kwargs: dict[str, Any] = dict(zip(("query1", "query2", "query3", "key", "value"), rows, strict=True))
    if form == "expanded":
        kwargs |= {"query1": image.expand(2, 5, 16), "query2": text.expand(2, 5, 16)}
    if form == "one key":
        kwargs |= {"query3": rows[2], "key": rows[2], "value": rows[2]}
    with torch.inference_mode(form == "inference mode"):
        if form == "by name":
            offset, first = module(**kwargs)
        else:
            offset, first = module(*kwargs.values())
        torch.testing.assert_close(offset, own(*kwargs.values())[0], rtol=1e-9, atol=1e-10)
    assert first is None


def test_inputs_of_mixed_types_use_the_modules_forward() -> None:
    module = PublishedAttention(16, 4, 1.0)
    patch(module)
    with (
        pytest.warns(UserWarning, match=r"its inputs are torch.float64, its parameters torch.float32"),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        module(*published_rows())
    with pytest.raises(TypeError):
        module(published_rows()[0])
