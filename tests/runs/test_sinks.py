"""Programs that draw a run get its numbers where they are asked for, and their absence is named before any work."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rada_fast import cli
from rada_fast.config.commands import EFTOptions
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.loops.eft import run_eft
from tests.loops.support import features_file, lines, text_file


class FakeWriter:
    """FakeWriter stands for TensorBoard's SummaryWriter."""

    def __init__(self, log_dir: str) -> None:
        self.folder = Path(log_dir)
        self.folder.mkdir(exist_ok=True)
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        (self.folder / "events.out.tfevents.1").write_text(str(len(self.scalars)))


class FakeWandb:
    """FakeWandb stands for the module wandb, and for a run of it."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **facts: Any) -> FakeWandb:
        self.started.append(facts)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def options(tmp_path: Path) -> EFTOptions:
    data = features_file(tmp_path / "a.npz", classes=4, each=4)
    text = ClassOptions(text_features=text_file(tmp_path / "text.npz", classes=4))
    run = RunOptions(output=str(tmp_path / "run"), log=("tensorboard", "wandb"))
    return EFTOptions(data, data, epochs=2, batch_size=4, text=text, adapter=AdapterOptions(num_heads=2), run=run)


def test_epochs_and_results_go_to_every_sink(
    options: EFTOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[FakeWriter] = []

    def writer(log_dir: str) -> FakeWriter:
        writers.append(FakeWriter(log_dir))
        return writers[-1]

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    summary = run_eft(options)
    losses = [record["loss"] for record in lines(tmp_path / "run", "epochs.jsonl")]
    (own,) = writers
    assert [(value, step) for name, value, step in own.scalars if name == "epoch/loss"] == [
        (losses[0], 1),
        (losses[1], 2),
    ]
    assert ("result/base/adapted_top1", summary["base"]["adapted_top1"], 2) in own.scalars
    assert [step for _, step in wandb.logged] == [1, 2, 2]
    assert wandb.logged[2][0]["result/adapted_harmonic_mean"] == summary["adapted_harmonic_mean"]
    assert wandb.finished == 1
    assert wandb.started[0]["config"]["epochs"] == 2

    # The numbers do not depend on the sinks, so the same run goes on without them, and as the same run with them.
    assert run_eft(dataclasses.replace(options, run=RunOptions(output=options.run.output)))["resumed"] == 2
    run_eft(options)
    assert wandb.started[0]["id"] == wandb.started[1]["id"]
    # Another run takes the folder, and the events of the one before it are gone.
    other = dataclasses.replace(options, epochs=1, run=RunOptions(output=options.run.output, overwrite=True))
    run_eft(other)
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_that_is_not_installed_is_named(
    name: str, options: EFTOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    output = Path(options.run.output)
    assert (
        cli.main(["eft", "--train", options.train, "--test", options.test, "--log", name, "--output", str(output)]) == 2
    )
    assert f"--log {name} needs the package {name}: pip install {name}" in capsys.readouterr().err
    assert not output.exists()
