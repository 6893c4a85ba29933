"""Epochs have records, orders and draws that depend on the seed alone, and errors that name the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.data import views
from rada_fast.data.open import open_source
from rada_fast.engine import training
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.engine.training import (
    Batch,
    ImageBatches,
    Keeping,
    Plan,
    Position,
    drawing_from,
    efficient_rate,
    feature_batches,
    shuffled,
    train_epochs,
    training_time,
)
from rada_fast.errors import UserError
from rada_fast.models.vision_language import load_model
from rada_fast.modules import RationalAdapter
from tests.pictures import write_class_folders

BATCH = Batch(normalize(torch.arange(1.0, 17).reshape(2, 8), dim=-1), torch.tensor([0, 1]))


def step_of(adapter: RationalAdapter) -> TrainingStep:
    optimizer = training_optimizer(adapter.parameters(), "adamw", lr=0.1, weight_decay=0.0)
    return TrainingStep(Gradients(adapter, torch.eye(3, 8), 10.0, Objective("l2", 1.5)), optimizer)


def epochs(plan: Plan, **options: Any) -> list[dict[str, Any]]:
    adapter = RationalAdapter(AdapterConfig.official(8))
    return list(train_epochs(step_of(adapter), adapter, plan, **options))


def test_a_record_holds_the_means_over_the_images() -> None:
    calls: list[int] = []
    plan = Plan(1, 1, lambda epoch, step: 0.25 / (step + 1), lambda epoch, first: [BATCH, BATCH], 0.25)
    (record,) = epochs(plan, on_step=lambda: calls.append(1))
    assert (record["epoch"], record["images"], record["lr"], len(calls)) == (1, 4, 0.125, 2)
    assert record["loss"] == pytest.approx(record["cross_entropy"] + 1.5 * record["penalty"], abs=1e-5)
    assert training_time([record])["training_seconds"] == record["seconds"]


def test_an_epoch_without_a_step_has_a_record() -> None:
    (record,) = epochs(Plan(1, 1, lambda epoch, step: 0.1, lambda epoch, first: [], 0.1, stage="rada"))
    assert (record["stage"], record["images"], record["lr"]) == ("rada", 0, 0.1)
    assert training_time([]) == {"training_seconds": 0, "images_per_second": None}


def test_a_loss_that_is_nan_names_the_learning_rate() -> None:
    spoilt = Batch(BATCH.inputs * torch.nan, BATCH.labels)
    with pytest.raises(UserError, match="lr 7 made the loss nan in epoch 1 of rada"):
        epochs(Plan(1, 1, lambda epoch, step: 0.1, lambda epoch, first: [spoilt], 7, stage="rada"))


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True), ([3e38, 3e38], True), ([float("nan"), 1.0], False), ([float("inf"), 1.0], False),
        ([float("inf"), -float("inf")], False), ([3e38, 3e38, -float("inf")], False), ([], True),
    ],
)  # fmt: skip
def test_finite_weights_are_told_from_others(values: list[float], finite: bool) -> None:
    assert training.is_finite(torch.tensor(values)) == finite


def test_weights_that_are_nan_after_the_last_step_are_reported() -> None:
    adapter = RationalAdapter(AdapterConfig.official(8))

    def spoil() -> None:
        adapter.get_parameter("k_proj.bias").data.fill_(torch.nan)

    plan = Plan(1, 1, lambda epoch, step: 0.1, lambda epoch, first: [BATCH], 7, option="finetune_lr", stage="rada")
    with pytest.raises(UserError, match="finetune_lr 7 made the weights no numbers in epoch 1 of rada"):
        list(train_epochs(step_of(adapter), adapter, plan, on_step=spoil))


def test_random_draws_depend_only_on_the_seed_and_the_name() -> None:
    before = torch.random.get_rng_state()
    drawn = []
    for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        with drawing_from(seed, name, torch.device("cpu")):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(shuffled(7, 0, "a"), shuffled(7, 0, "a"))
    assert sorted(shuffled(7, 0, "a").tolist()) == list(range(7))


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_batches_of_features_follow_the_order(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROWS_ORDERED", rows)
    features, labels = torch.arange(7.0)[:, None], torch.arange(7)
    batches = list(feature_batches(features, labels, shuffled(7, 0, "a"), 3, torch.device("cpu")))
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    assert all(torch.equal(batch.inputs[:, 0], batch.labels.float()) for batch in batches)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), shuffled(7, 0, "a"))


def test_the_rate_of_efficient_fine_tuning_warms_up_for_an_epoch() -> None:
    rate = efficient_rate(9e-4, "cosine", 3)
    assert [rate(epoch, 0) for epoch in range(3)] == pytest.approx([1e-5, 0.75 * 9e-4, 0.25 * 9e-4])
    assert efficient_rate(9e-4, "cosine", 1)(0, 0) == efficient_rate(9e-4, "constant", 3)(2, 0) == 9e-4
    assert efficient_rate(1e-6, "cosine", 3)(0, 0) == 1e-6


@pytest.mark.parametrize(("batch_size", "kept"), [(1, 1), (1, 15), (3, 2), (3, 6)])
def test_an_epoch_goes_on_from_a_stored_position_to_the_same_bits(batch_size: int, kept: int) -> None:
    """The record, the weights and the random numbers after a position are those of an uninterrupted epoch."""
    features, labels = normalize(torch.randn(16, 8), dim=-1), torch.arange(16) % 3
    started: list[int] = []

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        started.append(first)
        order = shuffled(16, 0, f"epoch {epoch}")
        return feature_batches(features, labels, order, batch_size, torch.device("cpu"), first=first)

    plan = Plan(2, -(-16 // batch_size), lambda epoch, step: 0.01 / (step + 1), batches, 0.01)
    adapter = RationalAdapter(AdapterConfig.official(8))
    stored: list[Any] = []
    drawn: list[float] = []

    def store(epoch: int, position: Position) -> None:
        if epoch == 1 and position.steps == kept:
            stored.extend(copy.deepcopy([adapter.state_dict(), step.optimizer.state_dict(), position]))
            drawn.clear()

    def draw() -> None:
        drawn.append(float(torch.rand(())))

    step = step_of(adapter)
    _, complete = train_epochs(step, adapter, plan, on_step=draw, keeping=Keeping(lambda epoch, ended: True, store))
    weights, expected = copy.deepcopy(adapter.state_dict()), drawn.copy()
    adapter.load_state_dict(stored[0])
    step = step_of(adapter)
    step.optimizer.load_state_dict(stored[1])
    drawn.clear()
    (resumed,) = train_epochs(step, adapter, plan, first=1, position=stored[2], on_step=draw)
    assert started == [0, 0, min(16, kept * batch_size)]
    assert drawn == expected
    times = {"seconds": 0, "images_per_second": 0}
    assert resumed | times == complete | times
    assert all(torch.equal(value, weights[name]) for name, value in adapter.state_dict().items())


@pytest.mark.parametrize("encoded", [False, True])
def test_batches_of_images_know_their_places_and_skip_what_came_before(
    encoded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places count pictures that cannot be read, too; a batch of such pictures alone is left out."""
    monkeypatch.setattr(training, "ENCODER_BATCH", 4)
    folder = write_class_folders(tmp_path / "pictures", ("red plain square", "blue plain ring", "green plain ring"))
    found = open_source(f"imagefolder:{folder}").samples
    samples = [replace(found[number % len(found)], id=str(number)) for number in range(13)]
    spoilt = [index for place, index in enumerate(shuffled(13, 0, "epoch").tolist()) if place in (1, 4, 5)]
    for index in spoilt:
        samples[index] = replace(samples[index], path=tmp_path / "missing.png")
    noted: list[str] = []
    reader = ImageBatches(
        samples, load_model("embedded"), 2, 0, crops=True, encoded=encoded, workers=0,
        note_unreadable=lambda images: noted.extend(image.reason for image in images),
    )  # fmt: skip
    complete = list(reader.epoch("epoch", "views"))
    assert [(batch.start, batch.until) for batch in complete] == [(0, 2), (2, 4), (6, 8), (8, 10), (10, 12), (12, 13)]
    assert [len(batch.labels) for batch in complete] == [1, 2, 2, 2, 2, 1]
    assert len(noted) == 3
    read: list[Path] = []
    read_image = views.read_image

    def note(path: Path) -> Any:
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(views, "read_image", note)
    for number, batch in enumerate(complete, start=1):
        read.clear()
        rest = list(reader.epoch("epoch", "views", batch.until))
        assert [tuple(one[3:]) for one in rest] == [tuple(one[3:]) for one in complete[number:]]
        for one, same in zip(rest, complete[number:], strict=True):
            assert torch.equal(one.inputs, same.inputs)
            assert (one.labels.tolist(), one.ids) == (same.labels.tolist(), same.ids)
        assert len(read) == 13 - (batch.until // 4 * 4 if encoded else batch.until)
