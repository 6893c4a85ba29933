"""eft and fft save everything that a training needs to go on, and set a state aside that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from rada_fast.config.options import RunOptions
from rada_fast.errors import UserError
from rada_fast.loops.training import Training, drawing_from, shuffled, step_loss, train_epoch, training_time
from rada_fast.models.image_features import Unreadable
from rada_fast.runs.folder import RunFolder
from rada_fast.system import notices


def training(folder: RunFolder, width: int = 3) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(width, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    return Training(folder, "rada.pt", model, AdamW(model.parameters(), lr=0.1), scaler, name="rada")


def epoch(trainer: Training) -> None:
    inputs, labels = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(len(trainer.records))),
        torch.arange(4) % 2,
    )

    def loss(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return step_loss(trainer.trained(inputs), torch.zeros(()), target, 0.0)

    trainer.save(train_epoch(trainer, [(inputs, labels)], loss, lambda step: 0.1, lr=0.1, micro_batch=3))


def folder_in(path: Path) -> RunFolder:
    return RunFolder(RunOptions(output=str(path / "run")), {"command": "fft"})


def test_a_training_goes_on_to_the_same_weights_and_gradient_scale(tmp_path: Path) -> None:
    with folder_in(tmp_path / "complete") as folder:
        complete = training(folder)
        assert complete.resume() == 0
        for _ in range(3):
            epoch(complete)
    with folder_in(tmp_path / "cut") as folder:
        before = training(folder)
        before.kept_weights = {"weight": torch.ones(1)}
        before.note_unreadable([Unreadable("a", 0, "torn"), Unreadable("a", 0, "torn")])
        epoch(before)
        after = training(folder)
        assert after.resume() == 1
        assert after.unreadable == {"a": ("a", 0, "torn")}
        assert after.kept_weights is not None
        assert bool(after.kept_weights["weight"] == 1)
        for _ in range(2):
            epoch(after)
    assert after.scaler.state_dict() == complete.scaler.state_dict()
    assert after.scaler.get_scale() == 16.0
    assert all(
        torch.equal(a, b) for a, b in zip(after.trained.parameters(), complete.trained.parameters(), strict=True)
    )


def test_resuming_restores_the_lines_of_the_state(tmp_path: Path) -> None:
    """Resuming restores lines that a crash tore, lost or added after the state was written."""
    with folder_in(tmp_path) as folder:
        first = training(folder)
        epoch(first)
        epoch(first)
        path = folder.path / "epochs.jsonl"
        correct = path.read_text()
        for wrong in ("", correct[:-10], correct + correct, correct.splitlines()[0] + "\n"):
            path.write_text(wrong)
            training(folder).resume()
            assert path.read_text() == correct
        assert [json.loads(line)["epoch"] for line in correct.splitlines()] == [1, 2]


def test_a_state_of_other_weights_is_set_aside_unused(tmp_path: Path) -> None:
    with notices.collecting(), folder_in(tmp_path) as folder:
        epoch(training(folder))
        other = training(folder, width=5)
        assert other.resume() == 0
        assert torch.equal(other.trained.weight, training(folder, width=5).trained.weight)
        assert "rada.pt is damaged (it holds other weights)" in notices.so_far()[0]


def test_an_unusable_state_is_set_aside(tmp_path: Path) -> None:
    """A file that is undamaged but holds something else causes no traceback later on, and its NaN are not used."""
    with notices.collecting(), folder_in(tmp_path) as folder:
        epoch(training(folder))
        path = folder.path / "rada.pt"
        state = torch.load(path, weights_only=True)
        moments = {0: {"exp_avg": torch.zeros(7)}}
        for change, reason in (
            ({"records": [{}]}, "it lacks 'epoch'"),
            ({"records": ["a"]}, "must be integers"),
            ({"records": state["records"] * 2}, "its epochs do not count from 1"),
            ({"trained": {name: tensor * torch.nan for name, tensor in state["trained"].items()}}, "are no numbers"),
            ({"trained": {name: tensor.half() for name, tensor in state["trained"].items()}}, "holds other weights"),
            ({"optimizer": state["optimizer"] | {"state": moments}}, "its optimizer is one of other weights"),
        ):
            torch.save(state | change, path)
            assert training(folder).resume() == 0
            assert reason in notices.so_far()[-1]


def test_an_epoch_without_a_step_has_a_record(tmp_path: Path) -> None:
    with folder_in(tmp_path) as folder:
        record = train_epoch(training(folder), [], lambda inputs, target: (inputs, target), lambda step: 0.1, lr=0.1)
    assert (record["images"], record["lr"]) == (0, 0.1)
    assert training_time([]) == {"training_seconds": 0, "images_per_second": None}


def test_a_loss_that_is_nan_names_the_learning_rate(tmp_path: Path) -> None:
    with folder_in(tmp_path) as folder:
        trainer, batch = training(folder), (torch.ones(2, 3), torch.zeros(2).long())

        def loss(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = trainer.trained(inputs).sum() * torch.nan
            return value, value.detach().expand(4)

        with pytest.raises(UserError, match="lr 7 made the loss nan in epoch 1 of rada"):
            train_epoch(trainer, [batch], loss, lambda step: 0.1, lr=7)


def test_weights_that_are_nan_after_the_last_step_are_not_saved(tmp_path: Path) -> None:
    with folder_in(tmp_path) as folder:
        trainer = training(folder)

        def spoil() -> None:
            trainer.trained.weight.data.fill_(torch.nan)

        def loss(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (value := trainer.trained(inputs).sum()), value.detach().expand(4)

        batch = (torch.ones(2, 3), torch.zeros(2).long())
        with pytest.raises(UserError, match="finetune_lr 7 made the weights no numbers in epoch 1 of rada"):
            train_epoch(trainer, [batch], loss, lambda step: 0.1, lr=7, option="finetune_lr", on_step=spoil)


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
    assert sorted(torch.cat(shuffled(7, 3, 0, "a")).tolist()) == list(range(7))
    assert [len(step) for step in shuffled(7, 3, 0, "a")] == [3, 3, 1]
