"""eft and fft save everything that a training needs to go on, and set a state aside that does not fit."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import RunOptions
from rada_fast.engine.optimizers import training_optimizer
from rada_fast.engine.steps import Gradients, Objective, TrainingStep
from rada_fast.engine.training import Batch, Plan, train_epochs
from rada_fast.loops.training import Training
from rada_fast.models.image_features import Unreadable
from rada_fast.modules import RationalAdapter
from rada_fast.runs.folder import RunFolder
from rada_fast.system import notices


def training(folder: RunFolder, width: int = 8) -> Training:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RationalAdapter(AdapterConfig.official(width))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimizer = training_optimizer(adapter.parameters(), "adamw", lr=0.01, weight_decay=0.1)
    return Training(folder, "rada.pt", adapter, optimizer, scaler)


def epoch(trainer: Training) -> None:
    """Train for one more epoch of a single step in two parts, and save the state."""

    def batches(epoch: int, first: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        return [Batch(normalize(torch.randn(4, 8, generator=generator), dim=-1), torch.arange(4) % 2)]

    assert isinstance(trainer.trained, RationalAdapter)
    gradients = Gradients(trainer.trained, torch.eye(2, 8), 5.0, Objective("l2", 1.0))
    step = TrainingStep(gradients, trainer.optimizer, micro_batch=3, scaler=trainer.scaler)
    finished = len(trainer.records)
    plan = Plan(finished + 1, 1, lambda epoch, step: 0.01, batches, 0.01, stage="rada")
    (record,) = train_epochs(step, trainer.trained, plan, first=finished)
    trainer.save(record)


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
        other = training(folder, width=16)
        assert other.resume() == 0
        started = training(folder, width=16).trained.state_dict()
        assert all(torch.equal(value, started[name]) for name, value in other.trained.state_dict().items())
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


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory."), OSError(errno.ESTALE, "stale")])
def test_a_state_that_cannot_be_read_at_present_is_kept(tmp_path: Path, error: Exception) -> None:
    with folder_in(tmp_path) as folder:
        epoch(training(folder))
        before = (folder.path / "rada.pt").read_bytes()

        def fail(state: object) -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            folder.load_state("rada.pt", fail)
        assert raised.value is error
        assert (folder.path / "rada.pt").read_bytes() == before
