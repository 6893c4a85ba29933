"""The drop-in class and the patching of live published models, on a stand-in with the published attribute names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rada_fast.compat import SimpleMultiheadAttention, patch, unpatch
from rada_fast.config import AdapterConfig
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter

NAMES = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


class PublishedAttention(nn.Module):
    """A stand-in for the published module, evaluated by the plain formula."""

    def __init__(self, embed_dim: int, num_heads: int, t: float, first: str = "q_proj1") -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.temprature = embed_dim, num_heads, t
        self.head_dim = embed_dim // num_heads
        self.dropout = nn.Dropout(0.0)
        self.first = first
        for name in (first, *NAMES[1:]):
            self.add_module(name, nn.Linear(embed_dim, embed_dim))

    def forward(
        self,
        query1: Tensor,
        query2: Tensor,
        query3: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        B, K, D = query1.shape
        rows = [query1, query2, query3, key, value]
        projected = [getattr(self, name)(row) for name, row in zip((self.first, *NAMES[1:5]), rows, strict=True)]
        q1, q2, q3, k, v = (row.view(B, K, self.num_heads, -1).transpose(1, 2) for row in projected)
        maps = []
        for q in (q1, q2, q3):
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            if attn_mask is not None:
                scores = scores + attn_mask
            maps.append((scores.view(B, self.num_heads, -1) / self.temprature).softmax(-1).view(scores.shape) * K)
        attended = (sum(maps[1:], maps[0]) / 3) @ v
        return self.out_proj(attended.transpose(1, 2).reshape(B, K, D)), maps[0]


class PublishedModel(nn.Module):
    """A stand-in for the published CustomCLIP: an encoder, class features, the adapter named mha."""

    def __init__(self, embed_dim: int, num_heads: int, t: float, text: Tensor, log_scale: float) -> None:
        super().__init__()
        self.image_encoder = nn.Identity()
        self.class_features = text
        self.logit_scale = nn.Parameter(torch.tensor(log_scale, dtype=text.dtype), requires_grad=False)
        self.mha = PublishedAttention(embed_dim, num_heads, t).to(text.dtype)

    def forward(self, image: Tensor, label: Tensor | None = None, training: bool = False) -> Any:
        image, text = self.image_encoder(image), self.class_features
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        image, text = image.unsqueeze(1), text.unsqueeze(0)
        rational = image * text
        B, K, _ = rational.shape
        scale = self.logit_scale.exp().data
        q1, q2 = image.repeat(1, K, 1), text.repeat(B, 1, 1)
        offset, _ = self.mha(scale.sqrt() * q1, scale.sqrt() * q2, scale * rational, scale * rational, scale * rational)
        mask = torch.relu(torch.ones_like(offset) + offset)
        logits = self.logit_scale.exp() * (mask * rational).sum(-1)
        if not training:
            return logits
        linf = (mask - 1).abs().flatten(1).max(dim=1)[0].mean()
        assert label is not None
        return logits, cross_entropy(logits, label), linf


def model_of(shared: Path, name: str, dtype: torch.dtype) -> tuple[PublishedModel, dict[str, Tensor]]:
    with np.load(shared / "data" / "official_vectors" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    text = arrays["text"].to(dtype)
    log_scale = float(arrays["logit_scale"].log())
    model = PublishedModel(text.shape[1], int(arrays["num_heads"]), float(arrays["temperature"]), text, log_scale)
    state = {key.removeprefix("param."): value.to(dtype) for key, value in arrays.items() if key.startswith("param.")}
    model.mha.load_state_dict(state)
    return model, arrays


@pytest.mark.parametrize("name", ["small_d64", "medium_d128", "hot_d64"])
def test_a_patched_model_gives_the_published_logits_and_gradients(shared: Path, name: str) -> None:
    model, arrays = model_of(shared, name, torch.float64)
    assert patch(model) == ["mha"]
    logits, entropy, linf = model(arrays["image"].double(), arrays["label"], training=True)
    (entropy + 0.5 * linf).backward()
    assert (logits - arrays["logits"]).abs().max() <= 1e-9
    for key, parameter in model.mha.named_parameters():
        wanted = arrays[f"grad.{key}"].double()
        assert parameter.grad is not None
        assert (parameter.grad - wanted).norm() <= 1e-7 * wanted.norm(), key


def small_model(dtype: torch.dtype = torch.float64) -> PublishedModel:
    return PublishedModel(16, 8, 1.0, torch.randn(5, 16, dtype=dtype), 4.6)


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
    # The prompt-tuning variants train through the features: both inputs must get the whole gradient.
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
    wanted = attention(*rows)[0]
    patch(attention)
    with pytest.warns(UserWarning, match="its queries are not one row per image"):
        got = attention(*rows)[0]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(attention(*rows)[0], wanted)  # warned once


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


def test_the_query_key_variant() -> None:
    class QueryKey(PublishedAttention):
        def forward(self, query1: Tensor, query2: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(query1, query2, key, key, value)

    attention = QueryKey(16, 4, 1.0, first="q_proj").double()
    image, text = torch.randn(2, 1, 16).double(), torch.randn(1, 5, 16).double()
    arguments = (image.repeat(1, 5, 1), text.repeat(2, 1, 1), image * text, image * text)
    wanted = attention(*arguments)[0]
    assert patch(attention) == [""]
    torch.testing.assert_close(attention(*arguments)[0], wanted, rtol=1e-10, atol=1e-12)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(UserError, match=r"model must hold a published rational adapter .*, Linear has none"):
        patch(nn.Linear(2, 2))


def test_the_drop_in_class_is_the_published_module() -> None:
    published = PublishedAttention(16, 4, 0.5).double()
    drop_in = SimpleMultiheadAttention(embed_dim=16, num_heads=4, t=0.5).double()
    assert bool((drop_in.state_dict()["out_proj.weight"] == 0).all())
    drop_in.load_state_dict(published.state_dict())
    rows = [torch.randn(2, 5, 16, dtype=torch.float64) for _ in range(5)]
    mask = torch.randn(5, 5, dtype=torch.float64)
    for wanted, got in zip(published(*rows, attn_mask=mask), drop_in(*rows, attn_mask=mask), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_the_drop_in_class_from_features_is_the_adapter() -> None:
    drop_in = SimpleMultiheadAttention(16, 8, t=1.0).double()
    nn.init.normal_(drop_in.get_parameter("out_proj.weight"))
    adapter = RationalAdapter(AdapterConfig.official(16)).double()
    adapter.load_state_dict(drop_in.state_dict())
    image = nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=-1)
    text = nn.functional.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1)
    logits, mask = drop_in.forward_features(image, text, 100.0)
    assert torch.equal(logits, adapter(image, text, 100.0))
    assert torch.equal(mask, adapter.mask(image, text, 100.0))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embed_dim 16, got 3"):
        SimpleMultiheadAttention(16, 3, t=1.0)
