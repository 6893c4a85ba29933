"""The stages of full fine-tuning choose the parts of a step by memory, and checkpoints do not change the gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rada_fast.config.commands import FFTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import RunOptions
from rada_fast.engine import full_training
from rada_fast.engine.full_training import Stage, stage_step, stages_of
from rada_fast.engine.parts import images_at_once, part_bytes
from rada_fast.errors import UserError
from rada_fast.models.vision_language import VisionLanguageModel, load_model
from rada_fast.modules import RationalAdapter
from rada_fast.modules.classifier import Classifier
from rada_fast.ops import backends

ENCODER = Stage("rada-ft", 1, 1e-3, 0.0, trains_encoder=True)


def options(**changes: Any) -> FFTOptions:
    return FFTOptions(train="memory", test=("memory",), run=RunOptions(output="unused"), **changes)


def classifier(width: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RationalAdapter(AdapterConfig.official(width))
        return Classifier(normalize(torch.randn(4, width), dim=-1), adapter, 20.0)


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return load_model("embedded")


def gradients(vlm: VisionLanguageModel, **changes: Any) -> dict[str, Tensor]:
    """Return the gradients of the image encoder after a step with a learning rate of 0."""
    size = vlm.preprocess.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    chosen = options(batch_size=4, weight_decay=0.0, **changes)
    with stage_step(ENCODER, classifier(vlm.embed_dim), vlm, chosen) as made:
        assert vlm.model.visual.training
        made.step(images, torch.arange(4), 0.0, ["a", "b", "c", "d"])
        found = {name: value.grad.clone() for name, value in vlm.model.visual.named_parameters()}
    assert not vlm.model.visual.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    vlm.model.zero_grad()
    return found


def test_checkpoints_and_parts_do_not_change_the_gradients(vlm: VisionLanguageModel) -> None:
    whole = gradients(vlm)
    for changes in ({"grad_checkpointing": True}, {"micro_batch": 3}, {"grad_checkpointing": True, "micro_batch": 1}):
        for name, value in gradients(vlm, **changes).items():
            limit = 1e-4 * float(whole[name].abs().max())
            torch.testing.assert_close(value, whole[name], rtol=0, atol=limit)


def test_an_encoder_without_checkpoints_is_named() -> None:
    other: Any = SimpleNamespace(name="other", model=SimpleNamespace(visual=torch.nn.Linear(2, 2)))
    with (
        pytest.raises(UserError, match="grad_checkpointing needs an image encoder with checkpoints, which other"),
        stage_step(ENCODER, classifier(16), other, options(grad_checkpointing=True)),
    ):
        pass


def test_parts_take_the_encoders_activations_into_account(
    vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ask(*args: Any, extra: int, **kwargs: Any) -> int:
        asked.append(extra)
        return images_at_once(*args, extra=extra, **kwargs)

    monkeypatch.setattr(full_training, "images_at_once", ask)
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    for checkpoints in (False, True):
        with stage_step(ENCODER, classifier(vlm.embed_dim), vlm, options(grad_checkpointing=checkpoints)) as made:
            assert made.step.micro_batch == min(512, images_at_once(
                made.trained[0].head.config, 4, torch.device("cpu"), extra=asked[-1]
            ))  # fmt: skip
    # Each of the blocks keeps some tensors of all tokens and their four times wider inner layer.
    visual = vlm.model.visual
    rows = visual.positional_embedding.shape[0] * visual.positional_embedding.shape[1] * 4
    assert asked[0] > 8 * rows * len(visual.transformer.resblocks)
    assert asked[1] == int(full_training.CHECKPOINTED_SHARE * asked[0])
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())


def test_the_memory_decides_how_many_images_are_computed_at_once() -> None:
    model, rada = classifier(16), stages_of(options())[0]
    trained = sum(parameter.numel() for parameter in model.parameters())
    head = model.head
    assert isinstance(head, RationalAdapter)
    fixed = 20 * trained + 4 * 8 * 16
    part = part_bytes(head.config, 4, torch.device("cpu"), fused=backends()["cpu"] == "usable")
    for images in (1, 3, 8):
        memory = f"{(fixed + part.of(images) + 1) / 2**10:.6f}KiB"
        with stage_step(rada, model, None, options(batch_size=8, memory=memory)) as made:
            assert made.step.micro_batch == images
    least = -(-(fixed + part.of(1)) // 2**20)
    with (
        pytest.raises(UserError, match=f"memory must be at least {least}MiB for batches of 8, got 1KiB"),
        stage_step(rada, model, None, options(batch_size=8, memory="1KiB")),
    ):
        pass
    with pytest.raises(UserError, match="memory and micro_batch"):
        options(memory="1GiB", micro_batch=3)


def test_the_stages_of_the_options() -> None:
    assert [stage.name for stage in stages_of(options())] == ["rada", "rada-ft"]
    assert [stage.trains_encoder for stage in stages_of(options(stages="first"))] == [False]
    assert stages_of(options(finetune_lr=1e-5))[1] == Stage("rada-ft", 5, 1e-5, 0.0, trains_encoder=True)
