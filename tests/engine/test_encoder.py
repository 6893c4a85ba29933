"""Views are encoded in batches of one shape from memory of their own, by one call where the device can record it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rada_fast.engine import encoder as encoder_module
from rada_fast.engine.encoder import ViewEncoder
from rada_fast.models.vision_language import VisionLanguageModel, load_model


class StandIn:
    """StandIn takes a recording's place: a replay makes the call again, and writes into the same result."""

    made: list[StandIn]

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self.call, self.result, self.inside = call, call().clone(), False
        self.made.append(self)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def replay(self) -> Tensor:
        assert self.inside
        return self.result.copy_(self.call())


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load_model("embedded")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Let the encoder be recorded by stand-ins, as on a GPU, and return them."""
    StandIn.made = []
    monkeypatch.setattr(encoder_module, "Recording", StandIn)
    monkeypatch.setattr(encoder_module, "usable", lambda device: True)
    return StandIn.made


@pytest.mark.parametrize("views", [3, 20])
def test_a_recorded_encoder_reads_each_batch_and_keeps_earlier_results(
    model: VisionLanguageModel, recorded: list[StandIn], views: int
) -> None:
    batches = [list(torch.randn(count, views, 3, 48, 48).unbind()) for count in ((5, 2, 4) if views == 3 else (1, 1))]
    encoder = ViewEncoder(model, views)
    found = [encoder(batch) for batch in batches]
    for batch, features in zip(batches, found, strict=True):
        assert torch.equal(features, torch.stack([model.image_features(own) for own in batch]))
    assert len(recorded) == 1


def test_an_encoder_that_cannot_be_recorded_is_called_with_a_warning(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*given: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(encoder_module, "Recording", refuses)
    monkeypatch.setattr(encoder_module, "usable", lambda device: True)
    encoder = ViewEncoder(model, 20)
    views = torch.randn(20, 3, 48, 48)
    with pytest.warns(RuntimeWarning, match="launched one by one: RuntimeError: operation not permitted"):
        first = encoder([views])
    assert torch.equal(first, encoder([views]))  # without another warning
    assert torch.equal(first[0], model.image_features(views))


@pytest.mark.gpu
@pytest.mark.parametrize("views", [3, 64])
def test_a_graph_on_a_gpu_has_the_bits_of_single_launches(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("embedded", device="cuda")
    encoder = ViewEncoder(model, views)
    pictures = list(torch.randn(encoder.pictures, views, 3, 48, 48, device="cuda").unbind())
    graph = [encoder(pictures), encoder(pictures[-1:])]
    monkeypatch.setattr(encoder_module, "usable", lambda device: False)
    again = ViewEncoder(model, views)
    launches = [again(pictures), again(pictures[-1:])]
    assert all(torch.equal(one, other) for one, other in zip(graph, launches, strict=True))
