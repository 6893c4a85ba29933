"""TPT and MaPLe agree with steps that are written out without hooks, block by block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from rada_fast.bench.baselines.prompts import PromptEpisodes, PromptTraining, marginal_entropy
from rada_fast.models.vision_language import VisionLanguageModel, load_model

NAMES = ("red striped star", "blue plain ring", "green dotted cross")
PHOTO = "a photo of a {}."


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    found = load_model("embedded")
    found.model.double()
    # With the model's own multiplier, predictions for noise are so sure that their gradients are rounding errors, and
    # AdamW's first step makes large differences of them.
    found.model.logit_scale.data.fill_(math.log(20))
    return found


def views_of(vlm: VisionLanguageModel, count: int, seed: int = 0) -> Tensor:
    size = vlm.preprocess.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def text_features(vlm: VisionLanguageModel, context: Tensor, deep: list[Tensor]) -> Tensor:
    """Encode the classes with a context in place of the first words, and tokens of their own in the next blocks."""
    model, tokens = vlm.model, vlm.tokens([PHOTO.replace("{}", name) for name in NAMES])
    count = len(context)

    def put(rows: Tensor, learned: Tensor) -> Tensor:
        return torch.cat([rows[:, :1], learned.expand(len(rows), -1, -1), rows[:, 1 + count :]], dim=1)

    rows = put(model.token_embedding(tokens), context) + model.positional_embedding
    for number, block in enumerate(model.transformer.resblocks):
        if 0 < number <= len(deep):
            rows = put(rows, deep[number - 1])
        rows = block(rows, attn_mask=model.attn_mask)
    ends = model.ln_final(rows)[torch.arange(len(rows)), tokens.argmax(dim=-1)]
    return normalize(ends @ model.text_projection, dim=-1)


def image_features(vlm: VisionLanguageModel, views: Tensor, prompts: list[Tensor]) -> Tensor:
    """Encode views with tokens of their own behind those of the picture in the first blocks."""
    visual = vlm.model.visual
    patches = visual.conv1(views).flatten(2).transpose(1, 2)
    start = visual.class_embedding.expand(len(views), 1, -1)
    rows = visual.ln_pre(torch.cat([start, patches], dim=1) + visual.positional_embedding)
    length = rows.shape[1]
    for number, block in enumerate(visual.transformer.resblocks):
        if number < len(prompts):
            rows = torch.cat([rows[:, :length], prompts[number].expand(len(rows), -1, -1)], dim=1)
        rows = block(rows)
    return normalize(visual.ln_post(rows[:, :1])[:, 0] @ visual.proj, dim=-1)


def entropy_of_mean(logits: Tensor) -> Tensor:
    mean = logits.softmax(dim=-1).mean(dim=0)
    return -(mean * mean.log()).sum()


def kept(logits: Tensor) -> Tensor:
    entropy = -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
    return logits[entropy.argsort()[:2]]


def stepped(values: list[Tensor], loss: Tensor) -> list[Tensor]:
    """Return values after AdamW's first step with the rate 5e-3 and the weight decay 0.01."""
    gradients = torch.autograd.grad(loss, values)
    return [
        value.detach() * (1 - 5e-3 * 0.01) - 5e-3 * gradient / (gradient.abs() + 1e-8)
        for value, gradient in zip(values, gradients, strict=True)
    ]


def test_the_loss_is_the_entropy_of_the_mean_prediction() -> None:
    logits = 5 * torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(marginal_entropy(logits), entropy_of_mean(logits))


def test_tpt_takes_one_step_on_the_words(vlm: VisionLanguageModel) -> None:
    episodes = PromptEpisodes(vlm, NAMES, PHOTO, "context")
    episodes.tuning.double()
    scale = vlm.logit_scale
    encoded: list[int] = []

    def encode(views: Tensor) -> Tensor:
        encoded.append(len(views))
        return image_features(vlm, views, []).float()

    words = vlm.model.token_embedding(vlm.tokens(["a photo of a"]))[0, 1:5]
    for seed in (0, 1, 0):
        views = views_of(vlm, 24, seed)
        context = words.detach().clone().requires_grad_()
        features = image_features(vlm, views, [])
        logits = scale * features @ text_features(vlm, context, []).T
        (context,) = stepped([context], entropy_of_mean(kept(logits)))
        expected = scale * features[0] @ text_features(vlm, context, []).T
        answer = episodes(views, encode)
        torch.testing.assert_close(answer, expected.float(), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(answer, logits[0].float(), rtol=1e-3, atol=1e-3)
    assert encoded == 3 * [24, 1]


def maple_of(vlm: VisionLanguageModel, tuning: Any) -> tuple[list[Tensor], Any]:
    """Return copies of MaPLe's parameters, and a function from them to both features."""
    values = [parameter.detach().clone().requires_grad_() for parameter in tuning.parameters()]
    names = [name for name, _ in tuning.named_parameters()]

    def features(values: list[Tensor], views: Tensor) -> tuple[Tensor, Tensor]:
        found = dict(zip(names, values, strict=True))
        deep = [found["text_prompts.0"]]
        maps = [(found[f"prompt_projections.{n}.weight"], found[f"prompt_projections.{n}.bias"]) for n in (0, 1)]
        sources = [found["context"], *deep]
        prompts = [source @ weight.T + bias for source, (weight, bias) in zip(sources, maps, strict=True)]
        return image_features(vlm, views, prompts), text_features(vlm, found["context"], deep)

    return values, features


def test_maple_in_tpts_loop_takes_one_step_on_both_encoders_prompts(vlm: VisionLanguageModel) -> None:
    episodes = PromptEpisodes(vlm, NAMES, PHOTO, "coupled-prompts")
    episodes.tuning.double()
    episodes.start_here()
    views, scale = views_of(vlm, 24), vlm.logit_scale
    values, features = maple_of(vlm, episodes.tuning)
    image, text = features(values, views)
    values = stepped(values, entropy_of_mean(kept(scale * image @ text.T)))
    image, text = features(values, views[:1])
    for _ in range(2):
        answer = episodes(views, lambda _: pytest.fail("the prompts change the images"))
        torch.testing.assert_close(answer, (scale * image[0] @ text.T).float(), rtol=1e-4, atol=1e-4)


def test_maples_training_is_sgd_on_both_encoders_prompts(vlm: VisionLanguageModel) -> None:
    training = PromptTraining(vlm, NAMES, PHOTO)
    training.tuning.double()
    images, labels, scale = views_of(vlm, 2), torch.tensor([2, 1]), vlm.logit_scale
    values, features = maple_of(vlm, training.tuning)
    optimizer = torch.optim.SGD(values, lr=3.5e-3, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        training(images, labels)
        image, text = features(values, images)
        optimizer.zero_grad()
        cross_entropy(scale * image @ text.T, labels).backward()
        optimizer.step()
    with torch.no_grad():
        image, text = features(values, images)
        expected = (scale * image @ text.T).float()
        torch.testing.assert_close(training.predict(images), expected, rtol=1e-4, atol=1e-4)
