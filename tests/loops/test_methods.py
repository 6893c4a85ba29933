"""The methods that the paper compares with RAda train what their rows of the table say, and go on when interrupted."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions, TuningOptions
from rada_fast.data.open import open_source
from rada_fast.embedded import world
from rada_fast.engine import efficient_training, full_training
from rada_fast.engine.full_training import Stage, learning_rate
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.models.encoder_tuning import EncoderTuning
from rada_fast.models.image_features import features_of
from rada_fast.models.vision_language import load_model

from .conftest import load_tiny
from .support import eft_options, features_file, fft_options, lines, text_file

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
        assert any(key.startswith("text_encoder.") for key in stored) == (method == "flyp")
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw two shifted pictures of each of four classes, of which the model is less sure than of others."""
    everything, root = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("pictures")
    world.write_imagefolder(everything, 2, seed=1, shift="mixed")
    for folder in sorted(everything.iterdir())[:4]:
        shutil.copytree(folder, root / folder.name)
    return root


@pytest.fixture(scope="module")
def frozen(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the summary of RAda on the pictures, whose encoders stay as they are."""
    return run_eft(eft_options(pictures, pictures, tmp_path_factory.mktemp("frozen"), epochs=1))


@pytest.mark.parametrize("method", [name for name, row in EFT_METHODS.items() if row.tuning is not None])
def test_efficient_fine_tuning_trains_inside_the_encoders(
    pictures: Path, frozen: dict[str, Any], tmp_path: Path, method: Any
) -> None:
    tuning = TuningOptions(context_tokens=2, prompt_depth=2, adapter_depth=1, adapter_width=4)
    options = {"method": method, "tuning": tuning, "batch_size": 2, "lr": 2e-3, "schedule": "constant"}
    summary = run_eft(eft_options(pictures, pictures, tmp_path / "run", evaluate_every=1, **options))
    rational = EFT_METHODS[method].head == "rational"
    assert summary["preset"] == ("official" if rational else None)
    assert (tmp_path / "run" / "adapter.safetensors").exists() == rational
    stored = load_file(tmp_path / "run" / "method.safetensors")
    assert all(name.startswith("encoders.") for name in stored)
    kind = EFT_METHODS[method].tuning
    assert kind is not None
    start = EncoderTuning(kind, load_model("embedded"), "a photo of a {}.", tuning, 0)
    names = {f"encoders.{name}" for name, value in start.named_parameters() if value.requires_grad}
    assert set(stored) == names
    assert all(not torch.equal(stored[f"encoders.{name}"], value) for name, value in start.named_parameters())
    epochs = lines(tmp_path / "run", "epochs.jsonl")
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    # The answers at the end are those of the last epoch, before adaptation they are the frozen encoders'.
    assert [epochs[-1][f"{name}_top1"] for name in ("base", "new")] == [
        summary[name]["adapted_top1"] for name in ("base", "new")
    ]
    assert [summary[name]["zero_shot_top1"] for name in ("base", "new")] == [
        frozen[name]["zero_shot_top1"] for name in ("base", "new")
    ]


def test_training_inside_the_encoders_goes_on_to_the_same_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> EFTOptions:
        return eft_options(pictures, pictures, tmp_path / name, method="rada+prompt", train_views="crop", epochs=2)

    run_eft(config("whole"))
    original = efficient_training.efficient_rate

    def interrupting(*args: Any) -> Any:
        def rate(epoch: int, step: int) -> float:
            if epoch == 1 and step == 1:
                raise KeyboardInterrupt
            return original(*args)(epoch, step)

        return rate

    with monkeypatch.context() as patch:
        patch.setattr(efficient_training, "efficient_rate", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run_eft(config("resumed"))
    assert run_eft(config("resumed"))["resumed"] == 1
    for file in ("adapter.safetensors", "method.safetensors"):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "resumed"))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_context_is_trained_on_features_of_images(pictures: Path, tmp_path: Path) -> None:
    vlm = load_model("embedded")
    source = open_source(f"imagefolder:{pictures}")
    found = features_of(source, vlm, title="", workers=0)
    np.savez(tmp_path / "f.npz", features=found.features, labels=found.labels, class_names=np.array(source.class_names))
    spec, changes = f"features:{tmp_path / 'f.npz'}", {"method": "coop", "shots": None, "batch_size": 2}
    results = [
        run_eft(eft_options(pictures, pictures, tmp_path / name, **changes, **own))
        for name, own in (("images", {}), ("features", {"train": spec, "test": spec}))
    ]
    files = [load_file(tmp_path / name / "method.safetensors") for name in ("images", "features")]
    torch.testing.assert_close(files[0]["encoders.context"], files[1]["encoders.context"], rtol=1e-3, atol=1e-4)
    assert results[0]["base"]["adapted_top1"] == results[1]["base"]["adapted_top1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "coop", "text": ClassOptions(text_features="class-means")}, "method coop trains with prompts"),
        ({"method": "coop", "text": ClassOptions(templates=("openai",))}, "templates must be a single one"),
        ({"method": "prompt", "train": "features"}, "method prompt trains inside the image encoder and needs images"),
    ],
)  # fmt: skip
def test_methods_inside_the_encoders_need_prompts_and_images(
    pictures: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "train" in changes:
        changes = changes | {"train": features_file(tmp_path / "f.npz")}
    with pytest.raises(UserError, match=message):
        run_eft(eft_options(pictures, pictures, tmp_path / "run", **changes))


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
