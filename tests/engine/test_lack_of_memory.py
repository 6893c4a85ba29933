"""Where memory runs out, less is computed at once from there on, one line says so, and the results are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.engine import episodes
from rada_fast.engine.episodes import Adaptation
from rada_fast.engine.graphs import GRAPHS, GroupGraph, GroupInputs
from rada_fast.engine.groups import EpisodeGroup
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.models.vision_language import VisionLanguageModel
from rada_fast.modules.rational_adapter import new_adapter
from rada_fast.ops import backends
from rada_fast.system import notices
from tests.loops.conftest import SIZE, load_tiny

FAILURES: dict[str, Callable[[], Exception]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "libraries": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError,
}


class Allocator:
    """An Allocator fails where more rows are computed at once than there is room for.

    failure: makes the error that is raised.
    room: the most rows.
    """

    def __init__(self, failure: Callable[[], Exception], room: int) -> None:
        self.failure, self.room = failure, room
        self.sizes: list[int] = []

    def take(self, rows: int) -> None:
        self.sizes.append(rows)
        if rows > self.room:
            raise self.failure()


@pytest.fixture(autouse=True)
def _needs_groups(request: pytest.FixtureRequest) -> None:
    if "group" in request.node.name and backends()["cpu"] != "usable":
        pytest.skip("groups need the compiled extension")


def adaptation(most: int | None = 8) -> tuple[Adaptation, Tensor]:
    adapter = new_adapter(AdapterConfig.official(16), 0)
    text = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    views = torch.nn.functional.normalize(torch.randn(21, 6, 16), dim=-1)
    return Adaptation(adapter, text, 50.0, EpisodeConfig(), torch.float32, most=most), views


@pytest.mark.parametrize("kind", FAILURES)
def test_groups_of_episodes_become_smaller_with_the_same_results(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    adapt, views = adaptation()
    whole = adapt(views)
    allocator, call = Allocator(FAILURES[kind], 2), EpisodeGroup.__call__

    def limited(self: EpisodeGroup, *arguments: Any) -> Any:
        allocator.take(self.episodes)
        return call(self, *arguments)

    monkeypatch.setattr(EpisodeGroup, "__call__", limited)
    smaller = adapt(views)
    assert allocator.sizes == [8, 4, *[2] * 10, 1]
    assert torch.equal(smaller.adapted, whole.adapted)
    assert torch.equal(smaller.zero_shot, whole.zero_shot)
    adapt(views)
    assert allocator.sizes[13:] == [*[2] * 10, 1]  # the size is remembered
    assert notices.so_far() == [
        "the memory did not suffice to adapt to 8 images at once; from here on it is 4, which changes no result",
        "the memory did not suffice to adapt to 4 images at once; from here on it is 2, which changes no result",
    ]


def test_a_group_of_one_episode_without_room_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    adapt, views = adaptation()

    def fail(*arguments: Any) -> None:
        raise FAILURES["gpu"]()

    monkeypatch.setattr(EpisodeGroup, "__call__", fail)
    with pytest.raises(torch.OutOfMemoryError):
        adapt(views)
    assert len(notices.so_far()) == 3


def test_a_group_whose_recording_has_no_room_becomes_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording itself needs a device, so that a stand-in computes at once what it would replay."""
    torch.manual_seed(1)
    adapt, views = adaptation()
    adapt._group_scale = torch.tensor(50.0)
    whole = adapt(views)
    allocator = Allocator(FAILURES["gpu"], 2)

    class Stand(GroupGraph):
        def __init__(self, inputs: GroupInputs, rule: Any) -> None:
            allocator.take(len(inputs.views))
            self._group = EpisodeGroup(inputs.initial, rule, len(inputs.views))

        def __call__(self, inputs: GroupInputs) -> Any:
            return self._group(inputs.views, inputs.text_features, inputs.logit_scale)

        def close(self) -> None:
            pass

    monkeypatch.setattr("rada_fast.engine.graphs.GroupGraph", Stand)
    monkeypatch.setattr(episodes, "usable", lambda device: True)
    GRAPHS.clear()
    try:
        # The first group of a size is not recorded, the second is, and has no room.
        smaller = adapt(views)
        assert allocator.sizes == [8, 4, 2]
        assert torch.equal(smaller.adapted, whole.adapted)
    finally:
        GRAPHS.clear()


@pytest.fixture
def model() -> VisionLanguageModel:
    return load_tiny()


@pytest.mark.parametrize("kind", FAILURES)
def test_fewer_images_are_encoded_at_once(
    kind: str, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(11, 3, SIZE, SIZE)
    whole = model.image_features(images)
    allocator, encode = Allocator(FAILURES[kind], 3), model._features_at_once

    def limited(views: Tensor) -> Tensor:
        allocator.take(len(views))
        return encode(views)

    monkeypatch.setattr(model, "_features_at_once", limited)
    torch.testing.assert_close(model.image_features(images), whole)
    assert allocator.sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert [line.split(";")[0] for line in notices.so_far()] == [
        "the memory did not suffice to encode 11 images at once",
        "the memory did not suffice to encode 5 images at once",
    ]
    assert notices.so_far()[-1].endswith("from here on it is 2, which may change last bits of features")
    allocator.room = 0
    with pytest.raises((RuntimeError, MemoryError)):
        model.image_features(images)


def test_another_error_is_no_lack_of_memory(model: VisionLanguageModel) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.image_features(torch.randn(4, 3, SIZE, SIZE - 1))
    assert notices.so_far() == []


def trained(failure: Callable[[], Exception] | None, room: int, micro_batch: int | None, images: int = 7) -> Any:
    """Take three steps that train the tiny encoder, whose dropout draws random numbers, and return what they come to.

    failure, room: those of an Allocator, or None without one.
    """
    torch.manual_seed(0)
    vlm = load_tiny()
    for module in vlm.model.visual:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its draws depend on the parts of a step
    vlm.train_image_encoder(True)
    head = new_adapter(AdapterConfig.official(16), 0)
    text = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1).requires_grad_()
    gradients = Gradients(head, text, 50.0, Objective("l2", 1.0), of_images=True)
    parameters = [*head.parameters(), text, *vlm.model.visual.parameters()]
    allocator = Allocator(failure or MemoryError, room)

    def encode(some: Tensor, ids: Any) -> Tensor:
        allocator.take(len(some))
        return vlm.image_features_with_grad(some)

    step = TrainingStep(
        gradients, training_optimizer(parameters, "adamw", lr=1e-2, weight_decay=0.1), micro_batch=micro_batch,
        encode=encode,
    )  # fmt: skip
    for _ in range(3):
        step(torch.randn(images, 3, SIZE, SIZE), torch.randint(5, (images,)), 1e-2, [""] * images)
    return [parameter.detach().clone() for parameter in parameters], step.read_totals(), allocator.sizes


@pytest.mark.parametrize("kind", FAILURES)
def test_steps_of_a_training_are_taken_in_smaller_parts(kind: str) -> None:
    """The results are those of a run that was given the small parts from the start, to the bit."""
    weights, totals, sizes = trained(FAILURES[kind], 2, None)
    assert sizes == [7, 3, 1, *[1] * 6, *[1] * 14]
    same_weights, same_totals, _ = trained(None, 10, 1)
    assert all(torch.equal(one, other) for one, other in zip(weights, same_weights, strict=True))
    assert totals == same_totals
    assert notices.so_far()[0].startswith(
        "the memory did not suffice for 7 images of a step at once; from here on it is 3"
    )
    whole, _, _ = trained(None, 10, None)
    for one, other in zip(weights, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_step_whose_single_image_has_no_room_ends_the_training() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        trained(FAILURES["gpu"], 0, None)
