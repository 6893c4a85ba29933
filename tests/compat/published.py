"""Define a stand-in for the published model, with its attribute names, and helpers for the tests of compat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support import published_vectors

NAMES = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


class PublishedAttention(nn.Module):
    """PublishedAttention stands for the published module and evaluates the plain formula."""

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
    """PublishedModel stands for the published CustomCLIP: an encoder, class features, and the adapter named mha."""

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


def model_of(name: str, dtype: torch.dtype) -> tuple[PublishedModel, dict[str, Tensor]]:
    arrays, parameters, config = published_vectors(name, dtype)
    text = arrays["text"].to(dtype)
    log_scale = float(arrays["logit_scale"].log())
    model = PublishedModel(text.shape[1], config.num_heads, config.temperature, text, log_scale)
    model.mha.load_state_dict(parameters)
    return model, arrays


def small_model(dtype: torch.dtype = torch.float64) -> PublishedModel:
    return PublishedModel(16, 8, 1.0, torch.randn(5, 16, dtype=dtype), 4.6)


def published_rows(
    batch: int = 2, classes: int = 5, width: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Return the inputs that the published model gives to its adapter."""
    image, text = torch.randn(batch, 1, width, dtype=dtype), torch.randn(1, classes, width, dtype=dtype)
    scaled = [10.0 * (image * text) for _ in range(3)]
    return (10**0.5 * image.repeat(1, classes, 1), 10**0.5 * text.repeat(batch, 1, 1), *scaled)


def assert_same_as_unpatched(module: Any, own: Any, rows: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Check that the output and every gradient equal those of an unpatched copy."""
    outputs = []
    for one in (module, own):
        leaves = [row.clone().requires_grad_(row.requires_grad) for row in rows]
        torch.manual_seed(5)
        offset = one(*leaves, **kwargs)[0]
        parameters = [parameter for parameter in one.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(offset.square().sum(), parameters, allow_unused=True)
        outputs.append([offset.detach(), *gradients])
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
