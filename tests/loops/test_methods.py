"""The methods that the paper compares with RAda train what their rows of the table say, and go on when interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.engine import full_training
from rada_fast.engine.full_training import Stage, learning_rate
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft

from .conftest import load_tiny
from .support import features_file, fft_options, lines, text_file

HERE = Path("here")


def state(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{stage}-model.safetensors")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", FFT_METHODS)
def test_full_fine_tuning_trains_what_the_method_says(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    spec, stages = f"imagefolder:{specks}", FFT_METHODS[method].stages

    def config(name: str) -> FFTOptions:
        return fft_options(specks, specks, tmp_path / name, method=method, epochs=2, finetune_epochs=2, lr=1e-2,
                           finetune_lr=1e-2, batch_size=4, micro_batch=3)  # fmt: skip

    summary = run_fft(config("whole"))
    visual = load_tiny().model.visual.state_dict()
    for stage in stages:
        assert summary[stage.name][spec]["images"] == 4
        stored = state(tmp_path / "whole", stage.name)
        trained = {key for key, value in visual.items() if not torch.equal(value, stored.get(f"visual.{key}", value))}
        assert trained == (set() if stage.trains == "head" else set(visual))
        assert any(key.startswith("head.") for key in stored) == (method == "clip-adapter")
        assert (tmp_path / "whole" / f"{stage.name}-adapter.safetensors").exists() == (method == "rada")
    assert summary["preset"] == ("official" if method == "rada" else None)
    epochs = lines(tmp_path / "whole", "epochs.jsonl")
    assert [line["stage"] for line in epochs] == [stage.name for stage in stages for _ in range(2)]

    def interrupt(stage: Stage, *args: Any) -> float:
        if stage.name == stages[-1].name and args[1] == 1:
            raise KeyboardInterrupt
        return learning_rate(stage, *args)

    with monkeypatch.context() as patch:
        patch.setattr(full_training, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_fft(config("resumed"))
    assert run_fft(config("resumed"))["resumed"] == 2 * len(stages) - 1
    whole, resumed = (state(tmp_path / name, stages[-1].name) for name in ("whole", "resumed"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.usefixtures("tiny")
def test_l2_sp_stays_closer_to_the_start(specks: Path, tmp_path: Path) -> None:
    start = {f"visual.{name}": value for name, value in load_tiny().model.visual.state_dict().items()}
    distances = []
    for weight in (0.0, 100.0):
        name = f"pull {weight}"
        run_fft(fft_options(specks, specks, tmp_path / name, method="l2-sp", epochs=5, pull_weight=weight,
                            finetune_lr=1e-3))  # fmt: skip
        stored = state(tmp_path / name, "l2-sp")
        distances.append(sum(float((stored[key] - value).norm()) for key, value in start.items()))
    assert distances[1] < distances[0] / 2


@pytest.mark.usefixtures("tiny")
def test_the_means_of_weights_begin_and_end_with_the_trained_ones(specks: Path, tmp_path: Path) -> None:
    config = fft_options(specks, specks, tmp_path / "run", method="ft", epochs=2, finetune_lr=0.1)
    run_fft(config)
    # The shares can be given afterwards, and train nothing again.
    summary = run_fft(dataclasses.replace(config, ensemble=(0.0, 0.5, 1.0)))
    assert summary["resumed"] == 2
    found: dict[str, list[Any]] = {}
    for line in lines(tmp_path / "run"):
        found.setdefault(line["stage"], []).append((line["zero_shot"], line["adapted"]))
    assert list(found) == ["ft", "ensemble-0", "ensemble-0.5", "ensemble-1"]
    assert all(
        line["adapted"] == line["zero_shot"] for line in lines(tmp_path / "run") if line["stage"] == "ensemble-0"
    )
    assert [adapted for _, adapted in found["ensemble-1"]] == [adapted for _, adapted in found["ft"]]
    assert set(summary["ensemble-0.5"]) == {f"imagefolder:{specks}"}


@pytest.mark.parametrize("method", ["lp", "clip-adapter", "lp-ft"])
def test_methods_with_frozen_encoders_train_on_features(tmp_path: Path, method: Any) -> None:
    spec, text = features_file(tmp_path / "f.npz"), text_file(tmp_path / "t.npz", seed=1)
    summary = run_fft(FFTOptions(
        train=spec, test=(spec,), method=method, stages="first", epochs=20, batch_size=20, lr=5e-2,
        text=ClassOptions(text_features=text), run=RunOptions(output=str(tmp_path / "run")),
    ))  # fmt: skip
    (stage, *_) = FFT_METHODS[method].stages
    assert summary[stage.name][spec]["adapted_top1"] > summary[stage.name][spec]["zero_shot_top1"] + 20


@pytest.mark.parametrize("method", [name for name, row in EFT_METHODS.items() if row.tuning is None])
def test_heads_of_efficient_fine_tuning_learn_on_features(tmp_path: Path, method: Any) -> None:
    spec, text = features_file(tmp_path / "f.npz", noise=2.0), text_file(tmp_path / "t.npz", seed=1)

    def config(name: str, **changes: Any) -> EFTOptions:
        values: dict[str, Any] = {"train": spec, "test": spec, "method": method, "protocol": "all", "epochs": 8}
        return EFTOptions(
            text=ClassOptions(text_features=text), run=RunOptions(output=str(tmp_path / name)), **(values | changes)
        )

    summary = run_eft(config("run", lr=1e-2, batch_size=4, penalty_weight=0.0))
    assert summary["test"]["adapted_top1"] > summary["test"]["zero_shot_top1"]
    saved = tmp_path / "run" / ("adapter.safetensors" if method == "rada" else "method.safetensors")
    assert saved.exists()
    first, second = lines(tmp_path / "run", "epochs.jsonl")[0], lines(tmp_path / "run", "epochs.jsonl")[-1]
    assert second["loss"] < first["loss"]
    assert (first["penalty"] > 0) == (method != "clip-adapter")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fft_options(HERE, HERE, HERE, method="lp", adapter=AdapterOptions(num_layers=2)),
         "num_layers belongs to the rational adapter, and method lp has none"),
        (lambda: fft_options(HERE, HERE, HERE, method="ft", stages="first"), "stages must be both with"),
        (lambda: fft_options(HERE, HERE, HERE, method="lp", ensemble=(0.5,)), "ensemble needs a stage"),
        (lambda: fft_options(HERE, HERE, HERE, ensemble=(1.5,)), "ensemble must be from 0 to 1, got 1.5"),
        (lambda: EFTOptions("a", "a", method="clip-adapter", adapter=AdapterOptions(adapter="x")),
         "adapter belongs to the rational adapter, and method clip-adapter has none"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_method_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_flyp_needs_prompts_and_images(tmp_path: Path) -> None:
    spec, text = features_file(tmp_path / "f.npz"), text_file(tmp_path / "t.npz")
    for method, message in (
        ("flyp", "method flyp trains the image encoder and needs images"),
        ("lp-ft", "stages both"),
    ):
        config = FFTOptions(spec, (spec,), method=method, text=ClassOptions(text_features=text),
                            run=RunOptions(output=str(tmp_path / "run")))  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_fft(config)
