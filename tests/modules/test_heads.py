"""The heads of other methods compute what their equations say, and start with the zero-shot logits or close to them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.config.method import MASK_PENALTIES, AdapterConfig
from rada_fast.config.methods import HeadName
from rada_fast.modules.heads import AttentionHead, ClipAdapterHead, new_head
from rada_fast.modules.rational_adapter import RationalAdapter, new_adapter

WIDTH, SCALE = 16, 20.0


def rows(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


IMAGE, TEXT = rows(5, 0), rows(3, 1)


def make(name: Any, seed: int = 0) -> Any:
    return new_head(name, new_adapter(AdapterConfig.official(WIDTH), 0), seed=seed)


@pytest.mark.parametrize("name", [name for name in get_args(HeadName) if name != "clip-adapter"])
def test_heads_start_with_the_zero_shot_logits(name: Any) -> None:
    logits, penalty = make(name)(IMAGE, TEXT, SCALE, "l2")
    torch.testing.assert_close(logits, SCALE * IMAGE @ TEXT.T, rtol=1e-5, atol=1e-5)
    assert penalty.item() == 0
    assert torch.equal(make(name)(IMAGE, TEXT, SCALE), logits)


@pytest.mark.parametrize("name", get_args(HeadName))
def test_heads_depend_on_the_seed_alone(name: Any) -> None:
    state = torch.get_rng_state()
    first, again, other = (dict(make(name, seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    if first and name != "rational":
        assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_clip_adapter_does_not_depend_on_the_lengths_of_features() -> None:
    head = make("clip-adapter")
    assert isinstance(head, ClipAdapterHead)
    # The published code mixes features as the encoder makes them, before they are brought to unit norm.
    raw = 7.5 * IMAGE
    hidden = (raw @ head.down.weight.T).clamp(min=0) @ head.up.weight.T
    mixed = normalize(0.2 * hidden.clamp(min=0) + 0.8 * raw, dim=-1)
    torch.testing.assert_close(head(IMAGE, TEXT, SCALE), SCALE * mixed @ TEXT.T, rtol=1e-5, atol=1e-5)
    _, penalty = head(IMAGE, TEXT, SCALE, "l1")
    assert penalty.item() == 0


@pytest.mark.parametrize("penalty", MASK_PENALTIES)
def test_attention_masks_each_modality_by_itself(penalty: Any) -> None:
    head = make("attend-both")
    assert isinstance(head, AttentionHead)
    assert head.image is not None
    assert head.text is not None
    for part in (head.image, head.text):
        torch.nn.init.normal_(part.out_proj.weight, std=0.1)
    logits, value = head(IMAGE, TEXT, SCALE, penalty)
    image_mask, text_mask = head.image(IMAGE, SCALE), head.text(TEXT, SCALE)
    expected = SCALE * (image_mask * IMAGE) @ (text_mask * TEXT).T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    distances = [(image_mask - 1).abs(), (text_mask - 1)[None].abs()]
    parts = {
        "l2": [distance.square().mean() for distance in distances],
        "l1": [distance.mean() for distance in distances],
        "linf": [distance.flatten(1).amax(1).mean() for distance in distances],
    }
    torch.testing.assert_close(value, sum(parts[penalty]))
    # An image's mask is its own affair, and a class's mask follows the other classes.
    torch.testing.assert_close(head.image(IMAGE[:1], SCALE), image_mask[:1])
    assert not torch.allclose(head.text(TEXT[:2], SCALE), text_mask[:2])


def test_the_rational_head_is_the_adapter_itself() -> None:
    adapter = RationalAdapter(AdapterConfig.official(WIDTH))
    assert new_head("rational", adapter, seed=0) is adapter
