"""The towers of a model are the blocks of its two transformers, wherever a library keeps them."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from rada_fast.errors import UserError
from rada_fast.models.protocol import image_tower, text_tower
from rada_fast.models.vision_language import load_model

TEXT = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}


def clip(vision: dict[str, Any], *, custom: bool = False) -> nn.Module:
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.random.fork_rng():
        return kind(embed_dim=192, vision_cfg=vision, text_cfg=TEXT).eval()


def test_every_block_of_both_towers_is_called_with_its_tokens_in_turn() -> None:
    model = load_model("embedded")
    for tower, encode, count in (
        (model.image_tower(), lambda: model.image_features_with_grad(torch.zeros(2, 3, 48, 48)), 37),
        (model.text_tower(), lambda: model.text_features_with_grad(model.tokens(["a", "b"])), 20),
    ):
        seen: list[Any] = []
        hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in tower.blocks]  # noqa: B023
        features = encode()
        for hook in hooks:
            hook.remove()
        assert [tuple(tokens.shape) for tokens in seen] == [(2, count, tower.width)] * len(tower.blocks)
        assert features.shape == (2, 512)


@pytest.mark.parametrize("custom", [False, True])
def test_towers_of_timm_and_of_custom_text_encoders_are_found(custom: bool) -> None:
    model = clip(TIMM, custom=custom)
    image, text = image_tower(model), text_tower(model)
    assert image is not None
    assert text is not None
    assert (len(image.blocks), image.width, len(text.blocks), text.width) == (12, 192, 2, 16)


def test_a_convolutional_image_encoder_has_no_tower() -> None:
    assert image_tower(clip(RESNET)) is None
    model = load_model("embedded")
    model.model.visual = nn.Identity()
    with pytest.raises(UserError, match="model embedded: its image encoder is not a transformer"):
        model.image_tower()


def test_a_logit_bias_is_read_and_stated_where_there_is_one() -> None:
    model = load_model("embedded")
    assert model.logit_bias is None
    assert "logit_bias" not in (model.facts() or {})
    model.model.logit_bias = nn.Parameter(torch.full((1,), -10.0))
    assert model.logit_bias == -10.0
    assert (model.facts() or {})["logit_bias"] == -10.0


def test_token_ids_lead_to_gradients_and_texts_to_none() -> None:
    model = load_model("embedded")
    block = model.text_tower().blocks[0]
    block.requires_grad_(True)
    features: Tensor = model.text_features_with_grad(model.tokens(["red", "blue"]))
    assert features.requires_grad
    assert not model.encode_texts(["red", "blue"]).requires_grad
    torch.testing.assert_close(features.detach(), model.encode_texts(["red", "blue"]))
