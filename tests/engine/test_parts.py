"""The parts of a training step fit into their budget."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.engine.parts import BUDGETS, PartBytes, images_at_once, part_bytes
from rada_fast.engine.steps import Gradients, Objective
from rada_fast.modules import RationalAdapter
from rada_fast.ops import backends
from tests.support import allocated_by

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OFFICIAL = AdapterConfig.official(512)


def test_the_bytes_of_a_part() -> None:
    rows = 1000 * 512 * 4
    assert part_bytes(OFFICIAL, 1000, CUDA) == PartBytes(12 * rows)
    assert part_bytes(OFFICIAL, 1000, CPU, fused=False) == PartBytes(12 * rows + 4 * 3 * 8 * 1000**2 * 4)
    assert part_bytes(None, 1000, CPU) == PartBytes(16000)
    on_cpu = part_bytes(OFFICIAL, 1000, CPU)
    assert (on_cpu.each, on_cpu.working) == (6 * rows, 8 * rows)
    assert on_cpu.chunk == max(3, torch.get_num_threads() // 2)


@pytest.mark.parametrize("bytes_of", [PartBytes(7), PartBytes(7, 20), PartBytes(7, 20, 3, 5)])
def test_as_many_images_as_fit_are_computed_at_once(bytes_of: PartBytes) -> None:
    assert bytes_of.images(bytes_of.fixed) == 0
    for count in range(1, 8):
        assert bytes_of.images(bytes_of.of(count)) == count
        assert bytes_of.images(bytes_of.of(count) - 1) == count - 1


def test_at_least_one_image_is_computed_at_once() -> None:
    assert images_at_once(OFFICIAL, 1000, CUDA) == BUDGETS["cuda"] // (12 * 1000 * 512 * 4)
    assert images_at_once(OFFICIAL, 1000, CPU, budget=1) == 1
    assert images_at_once(OFFICIAL, 1000, CPU, extra=2**31) == 1


@pytest.mark.skipif(backends()["cpu"] != "usable", reason="needs the compiled extension")
@pytest.mark.parametrize(("preset", "images"), [("official", 1), ("official", 5), ("paper", 1), ("paper", 5)])
def test_the_operator_for_cpus_takes_no_more_than_that(preset: str, images: int) -> None:
    """Tensors are counted; a thread's own memory is less than the formula has for it. Text features are trained too."""
    config = getattr(AdapterConfig, preset)(128)
    classes = 500
    text = normalize(torch.randn(classes, 128), dim=-1).requires_grad_()
    gradients = Gradients(RationalAdapter(config), text, 20.0, Objective("l2", 1.0), of_images=True)
    features, labels = normalize(torch.randn(images, 128), dim=-1), torch.arange(images)
    gradients.add(features, labels)
    peak = allocated_by(lambda: gradients.add(features, labels)).peak
    promised = part_bytes(config, classes, CPU)
    of_threads = torch.get_num_threads() * (12 * classes * config.head_dim + 2**20) * 4
    of_gradients = 4 * sum(value.numel() for value in gradients.trained)
    assert 0.6 < peak / (promised.of(images) - of_threads + of_gradients) <= 1
