"""What is trained inside the encoders changes their features as its equation says, and nothing else."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from rada_fast.config.options import TuningOptions
from rada_fast.data.views import Preprocess
from rada_fast.errors import UserError
from rada_fast.models.encoder_tuning import EncoderTuning, captions_of
from rada_fast.models.prompts import Prompts
from rada_fast.models.vision_language import VisionLanguageModel, load_model

NAMES = ("red star", "blue ring", "green cross")
PHOTO = "a photo of a {}."


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return load_model("embedded")


def images(vlm: VisionLanguageModel) -> Tensor:
    size = vlm.preprocess.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def make(vlm: VisionLanguageModel, name: Any, template: str = PHOTO, **options: Any) -> EncoderTuning:
    return EncoderTuning(name, vlm, template, TuningOptions(**options), 0)


def features(vlm: VisionLanguageModel, tuning: EncoderTuning) -> tuple[Tensor, Tensor]:
    with tuning.attached(), torch.no_grad():
        return vlm.image_features_with_grad(images(vlm)), vlm.text_features_with_grad(tuning.tokens_of(NAMES))


@pytest.mark.parametrize("name", ["context", "adapters"])
def test_features_start_as_those_of_the_frozen_encoders(vlm: VisionLanguageModel, name: Any) -> None:
    tuning = make(vlm, name)
    image, text = features(vlm, tuning)
    torch.testing.assert_close(image, vlm.image_features(images(vlm)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, vlm.encode_texts([PHOTO.replace("{}", name) for name in NAMES]))
    assert tuning.changes_images == (name != "context")


def test_a_context_starts_at_random_where_the_prompt_has_fewer_words(vlm: VisionLanguageModel) -> None:
    tuning = make(vlm, "context", "{}.", context_tokens=6)
    assert tuning.context is not None
    assert float(tuning.context.detach().std()) == pytest.approx(0.02, rel=0.3)
    # Start, six learned tokens, the name, and the end.
    tokens, alone = tuning.tokens_of(NAMES), vlm.tokens(["red star."])
    assert tokens[0, 7:10].tolist() == alone[0, 1:4].tolist()
    again = make(vlm, "context", "{}.", context_tokens=6)
    assert again.context is not None
    assert torch.equal(again.context, tuning.context)


def test_a_context_is_the_same_as_other_words_at_its_place(vlm: VisionLanguageModel) -> None:
    tuning = make(vlm, "context")
    assert tuning.context is not None
    words = vlm.tokens(["red blue green star"])[0, 1:5]
    tuning.context.data = vlm.model.token_embedding.weight[words].detach().clone()
    _, text = features(vlm, tuning)
    torch.testing.assert_close(text, vlm.encode_texts([f"red blue green star {name}." for name in NAMES]))


def test_deep_prompts_are_what_each_block_sees(vlm: VisionLanguageModel) -> None:
    tuning = make(vlm, "prompts", context_tokens=2, prompt_depth=3)
    # The embedded model has four blocks for images and two for texts.
    assert [tuple(p.shape) for p in tuning.image_prompts] == [(2, vlm.image_tower().width)] * 3
    assert [tuple(p.shape) for p in tuning.text_prompts] == [(2, vlm.text_tower().width)]
    seen: dict[str, list[Tensor]] = {"image": [], "text": []}
    with tuning.attached(), torch.no_grad():
        hooks = [
            block.register_forward_pre_hook(lambda _, given, kind=kind: seen[kind].append(given[0]))
            for kind, tower in (("image", vlm.image_tower()), ("text", vlm.text_tower()))
            for block in tower.blocks
        ]
        vlm.image_features_with_grad(images(vlm))
        vlm.text_features_with_grad(tuning.tokens_of(NAMES))
        for hook in hooks:
            hook.remove()
    length = vlm.model.visual.positional_embedding.shape[0]
    assert [tokens.shape[1] for tokens in seen["image"]] == [length + 2] * 4
    for tokens, prompts in zip(seen["image"], tuning.image_prompts, strict=False):
        assert torch.equal(tokens[:, -2:], prompts.detach().expand(2, -1, -1))
    # Behind the last replaced prompts, the block's own output goes on.
    assert not torch.equal(seen["image"][3][:, -2:], seen["image"][2][:, -2:])
    assert {tokens.shape[1] for tokens in seen["text"]} == {vlm.tokens(["a"]).shape[1]}
    assert torch.equal(seen["text"][1][:, 1:3], tuning.text_prompts[0].detach().expand(3, -1, -1))


def test_coupled_prompts_of_images_are_projected_from_those_of_texts(vlm: VisionLanguageModel) -> None:
    tuning = make(vlm, "coupled-prompts", context_tokens=2, prompt_depth=9)
    # The embedded text encoder has two blocks, and no block of images has prompts beyond that depth.
    assert tuning.context is not None
    assert not len(tuning.image_prompts)
    assert [tuple(prompts.shape) for prompts in tuning.text_prompts] == [(2, vlm.text_tower().width)]
    seen: list[Tensor] = []
    blocks = vlm.image_tower().blocks
    with tuning.attached(), torch.no_grad():
        hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in blocks]
        vlm.image_features_with_grad(images(vlm))
        # A step changes the prompts while they are attached.
        tuning.context.mul_(2)
        vlm.image_features_with_grad(images(vlm))
        for hook in hooks:
            hook.remove()
    first, second = tuning.prompt_projections
    expected = [tuning.context.detach() / 2 @ first.weight.T + first.bias, second(tuning.text_prompts[0])]
    expected += [tuning.context.detach() @ first.weight.T + first.bias, second(tuning.text_prompts[0])]
    for tokens, prompts in zip(seen[:2] + seen[len(blocks) : len(blocks) + 2], expected, strict=True):
        torch.testing.assert_close(tokens[:, -2:], prompts.detach().expand(2, -1, -1))
    assert not torch.equal(seen[2][:, -2:], seen[1][:, -2:])


def test_adapters_add_what_they_make_of_a_blocks_output(vlm: VisionLanguageModel) -> None:
    tuning = make(vlm, "adapters", adapter_depth=1, adapter_width=5)
    assert len(tuning.image_adapters) == len(tuning.text_adapters) == 1
    before: list[Tensor] = []
    after: list[Tensor] = []
    block, norm = vlm.image_tower().blocks[-1], vlm.model.visual.ln_post
    torch.nn.init.normal_(tuning.image_adapters[0][2].weight)
    hooks = [block.register_forward_hook(lambda *given: before.append(given[2]))]
    hooks += [norm.register_forward_pre_hook(lambda _, given: after.append(given[0]))]
    features(vlm, tuning)
    for hook in hooks:
        hook.remove()
    expected = before[0] + tuning.image_adapters[0](before[0])
    torch.testing.assert_close(after[0], expected)


@pytest.mark.parametrize("name", ["context", "prompts", "coupled-prompts", "adapters"])
def test_everything_that_is_trained_gets_gradients_and_the_model_none(vlm: VisionLanguageModel, name: Any) -> None:
    tuning = make(vlm, name)
    for adapters in (tuning.image_adapters, tuning.text_adapters):
        for adapter in adapters:
            torch.nn.init.normal_(adapter[2].weight, std=0.1)  # type: ignore[index]
    with tuning.attached():
        image = vlm.image_features_with_grad(images(vlm))
        text = vlm.text_features_with_grad(tuning.tokens_of(NAMES))
    (image @ text.T)[:, 0].sum().backward()
    for key, parameter in tuning.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.any()), key
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    assert not any(key.startswith("_vlm") for key in tuning.state_dict())


@pytest.mark.parametrize("name", ["context", "prompts", "coupled-prompts", "adapters"])
def test_the_model_is_itself_again_afterwards(vlm: VisionLanguageModel, name: Any) -> None:
    views, prompts = images(vlm), [PHOTO.replace("{}", name) for name in NAMES]
    before = vlm.image_features(views), vlm.encode_texts(prompts)
    tuning = make(vlm, name)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_()
    changed = features(vlm, tuning)
    assert not torch.allclose(changed[1], before[1], atol=1e-3)
    assert torch.allclose(changed[0], before[0], atol=1e-3) == (name == "context")
    with pytest.raises(RuntimeError, match="inside"), tuning.attached():
        raise RuntimeError("inside")
    assert torch.equal(vlm.image_features(views), before[0])
    assert torch.equal(vlm.encode_texts(prompts), before[1])


def test_an_encoder_without_blocks_is_named(vlm: VisionLanguageModel) -> None:
    text = {"context_length": 20, "vocab_size": vlm.model.token_embedding.num_embeddings, "width": 16, "heads": 2}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
    module = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text | {"layers": 1})
    preprocess = Preprocess(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    resnet = VisionLanguageModel(
        "resnet", None, module, vlm.tokenizer, preprocess, device=vlm.device, precision="float32"
    )
    with pytest.raises(UserError, match="model resnet: its image encoder is not a transformer"):
        make(resnet, "prompts")
    assert make(resnet, "context").context is not None


def test_captions_are_drawn_from_the_prompts_of_the_class(vlm: VisionLanguageModel) -> None:
    captions = captions_of(vlm, NAMES, Prompts(("a photo of a {}.", "{}")))
    labels = torch.arange(3).repeat(50)
    torch.manual_seed(0)
    drawn = captions.drawn(labels)
    for label, name in enumerate(NAMES):
        own = {tuple(row.tolist()) for row in drawn[labels == label]}
        assert own == {tuple(row.tolist()) for row in vlm.tokens([f"a photo of a {name}.", name])}
