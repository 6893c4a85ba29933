"""Epochs have records, orders and draws that depend on the seed alone, and errors that name the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.engine import training
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.engine.training import (
    Batch,
    Plan,
    drawing_from,
    efficient_rate,
    feature_batches,
    shuffled,
    train_epochs,
    training_time,
)
from rada_fast.errors import UserError
from rada_fast.modules import RationalAdapter

BATCH = Batch(normalize(torch.arange(1.0, 17).reshape(2, 8), dim=-1), torch.tensor([0, 1]))


def step_of(adapter: RationalAdapter) -> TrainingStep:
    optimizer = training_optimizer(adapter.parameters(), "adamw", lr=0.1, weight_decay=0.0)
    return TrainingStep(Gradients(adapter, torch.eye(3, 8), 10.0, Objective("l2", 1.5)), optimizer)


def epochs(plan: Plan, **options: Any) -> list[dict[str, Any]]:
    adapter = RationalAdapter(AdapterConfig.official(8))
    return list(train_epochs(step_of(adapter), adapter, plan, **options))


def test_a_record_holds_the_means_over_the_images() -> None:
    calls: list[int] = []
    plan = Plan(1, 1, lambda epoch, step: 0.25 / (step + 1), lambda epoch: [BATCH, BATCH], 0.25)
    (record,) = epochs(plan, on_step=lambda: calls.append(1))
    assert (record["epoch"], record["images"], record["lr"], len(calls)) == (1, 4, 0.125, 2)
    assert record["loss"] == pytest.approx(record["cross_entropy"] + 1.5 * record["penalty"], abs=1e-5)
    assert training_time([record])["training_seconds"] == record["seconds"]


def test_an_epoch_without_a_step_has_a_record() -> None:
    (record,) = epochs(Plan(1, 1, lambda epoch, step: 0.1, lambda epoch: [], 0.1, stage="rada"))
    assert (record["stage"], record["images"], record["lr"]) == ("rada", 0, 0.1)
    assert training_time([]) == {"training_seconds": 0, "images_per_second": None}


def test_a_loss_that_is_nan_names_the_learning_rate() -> None:
    spoilt = Batch(BATCH.inputs * torch.nan, BATCH.labels)
    with pytest.raises(UserError, match="lr 7 made the loss nan in epoch 1 of rada"):
        epochs(Plan(1, 1, lambda epoch, step: 0.1, lambda epoch: [spoilt], 7, stage="rada"))


def test_weights_that_are_nan_after_the_last_step_are_reported() -> None:
    adapter = RationalAdapter(AdapterConfig.official(8))

    def spoil() -> None:
        adapter.get_parameter("k_proj.bias").data.fill_(torch.nan)

    plan = Plan(1, 1, lambda epoch, step: 0.1, lambda epoch: [BATCH], 7, option="finetune_lr", stage="rada")
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
