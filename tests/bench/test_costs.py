"""The formulas agree with what PyTorch's counter finds in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from rada_fast.bench import costs
from rada_fast.bench.adapter import Problem, operations_of, work_of
from rada_fast.bench.encoder import counted_encoder_operations, encoder_work, module_work, transformer_multiply_adds
from rada_fast.config.method import AdapterConfig
from rada_fast.models.vision_language import load_model


def test_the_encoder_has_the_operations_of_its_formula() -> None:
    vlm = load_model("embedded")
    visual = vlm.model.visual
    assert counted_encoder_operations(vlm, 3) == 3 * 2 * transformer_multiply_adds(visual, pooled_only=False)
    assert module_work(vlm, 3).operations == counted_encoder_operations(vlm, 3)
    # Of the last block's products, only those of the keys and the values are computed for all 37 tokens.
    saved = 36 * (2 * 160**2 + 2 * 160 * 640 + 2 * 37 * 160)
    assert encoder_work(vlm, 1).operations == counted_encoder_operations(vlm, 1) - 2 * saved
    # An encoder that is called as a module computes what the module computes.
    with torch.no_grad():
        hook = visual.register_forward_hook(lambda *_: None)
        assert encoder_work(vlm, 1).operations == counted_encoder_operations(vlm, 1)
        hook.remove()


@pytest.mark.parametrize(("batch", "classes"), [(1, 50), (6, 200)])
def test_the_adapter_has_about_the_operations_of_its_formula(batch: int, classes: int) -> None:
    problem = Problem(batch, classes, "official", "float32", backward=False)
    counted, least = operations_of(problem), work_of(problem, "reference").operations
    # The formula leaves out the projections of the text and image queries, and the scores of the image query.
    assert least <= counted <= least + 2 * (classes + batch) * 512**2 + 4 * batch * classes * 512


def test_an_episode_is_its_steps() -> None:
    config = AdapterConfig.official(512)
    forward, product = costs.least_operations(6, 200, 512), 2 * 6 * 200 * 512**2
    select, *steps, predict = costs.episode_work(config, 64, 6, 3, 200)
    assert select.operations == 2 * 64 * 200 * 512
    assert [work.operations for work in steps[::2]] == [
        forward + product, 3.5 * forward - 3 * product, 3.5 * forward
    ]  # fmt: skip
    assert all(work == costs.optimizer_work(6 * (512**2 + 512)) for work in steps[1::2])
    assert predict.operations == costs.least_operations(1, 200, 512)
    assert len(costs.episode_work(config, 64, 6, 0, 200)) == 2
