"""fine_tune trains on features and on pictures in one call, gives what the commands give, and names wrong arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

import rada_fast
from rada_fast.config.commands import EFTOptions, FFTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import ClassOptions, RunOptions
from rada_fast.engine.fine_tuning import fine_tune
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.models.vision_language import load_model
from rada_fast.modules import RationalAdapter

Problem = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """Return image features around a mean of each of five classes, their labels, and the means."""
    generator = torch.Generator().manual_seed(0)
    means = normalize(torch.randn(5, 16, generator=generator), dim=-1)
    labels = torch.arange(40) % 5
    return normalize(means[labels] + 0.3 * torch.randn(40, 16, generator=generator), dim=-1), labels, means


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for name in ("red star", "blue ring"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return f"imagefolder:{tmp_path / 'pictures'}"


def same(a: torch.nn.Module, b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


def test_three_lines_fine_tune_features_in_memory(problem: Problem) -> None:
    image_features, labels, text_features = problem
    options: dict[str, Any] = {"text_features": text_features, "logit_scale": 20.0, "epochs": 3, "batch_size": 8}
    tuned = rada_fast.fine_tune(image_features, labels, **options)
    logits = tuned(image_features)
    assert logits.shape == (40, 5)
    assert [record["epoch"] for record in tuned.records] == [1, 2, 3]
    assert tuned.records[-1]["loss"] < tuned.records[0]["loss"]
    assert torch.equal(tuned.text_features, text_features)
    assert tuned.model is None
    again = rada_fast.fine_tune(image_features, labels, **options)
    assert same(again.adapter, tuned.adapter.state_dict())


@pytest.mark.parametrize("setting", ["eft", "fft"])
def test_a_call_gives_what_the_command_gives(tmp_path: Path, problem: Problem, setting: Any) -> None:
    image_features, labels, text_features = problem
    np.savez(tmp_path / "f.npz", features=image_features, labels=labels)
    np.savez(tmp_path / "t.npz", features=text_features, labels=np.arange(5))
    spec, text = f"features:{tmp_path / 'f.npz'}", ClassOptions(text_features=f"features:{tmp_path / 't.npz'}")
    run = RunOptions(output=str(tmp_path / "run"), seed=3)
    # The command brings the rows of a file to unit norm, which may change their last bits.
    text_features = normalize(text_features, dim=-1)
    if setting == "eft":
        run_eft(EFTOptions(train=spec, test=spec, protocol="all", epochs=2, shots=4, text=text, run=run))
        options: dict[str, Any] = {"epochs": 2, "shots": 4}
    else:
        options = {"epochs": 2, "batch_size": 16, "micro_batch": 5}
        run_fft(FFTOptions(train=spec, test=(spec,), stages="first", finetune_from=1, text=text, run=run, **options))
    seen: list[Any] = []
    for train, own in ((image_features, labels), (spec, None)):
        tuned = fine_tune(
            train, own, setting=setting, text_features=text_features, seed=3, on_epoch=seen.append, **options
        )
        file = {"eft": "adapter.safetensors", "fft": "rada-adapter.safetensors"}[setting]
        assert same(tuned.adapter, load_file(tmp_path / "run" / file))
        assert seen[-2:] == list(tuned.records)
        if setting == "fft":
            stored = load_file(tmp_path / "run" / "rada-model.safetensors")["classifier.weight"]
            assert torch.equal(tuned.text_features, stored)


def test_full_fine_tuning_trains_a_copy_of_the_model(pictures: str) -> None:
    vlm = load_model("embedded")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    tuned = fine_tune(
        pictures, setting="fft", model=vlm, epochs=1, finetune_from=1, finetune_epochs=1, finetune_lr=1e-3, batch_size=4
    )
    assert same(vlm.model, before)
    assert tuned.model is not None
    assert not same(tuned.model.model.visual, vlm.model.visual.state_dict())
    assert not any(parameter.requires_grad for parameter in tuned.model.model.parameters())
    assert tuned.model.fingerprint != vlm.fingerprint
    assert [record["stage"] for record in tuned.records] == ["rada", "rada-ft"]
    assert tuned.class_names == ("red star", "blue ring") or tuned.class_names == ("blue ring", "red star")
    images = torch.randn(2, 3, vlm.preprocess.image_size, vlm.preprocess.image_size)
    # Weights that were prepared before the training are out of date.
    with torch.no_grad():
        expected = tuned.model.image_features_with_grad(images)
    torch.testing.assert_close(tuned.model.image_features(images), expected, rtol=1e-4, atol=1e-5)
    assert tuned(tuned.model.image_features(images)).shape == (2, 2)


def test_pictures_are_encoded_by_a_model_that_is_named(pictures: str) -> None:
    tuned = fine_tune(pictures, model="embedded", epochs=1, train_views="crop", class_names=["a ring", "a star"])
    assert (tuned.records[0]["images"], len(tuned.text_features)) == (6, 2)
    assert tuned.class_names == ("a ring", "a star")


def test_a_given_adapter_is_copied_and_its_frozen_parameters_stay(problem: Problem) -> None:
    image_features, labels, text_features = problem
    adapter = RationalAdapter(AdapterConfig.official(16))
    adapter.requires_grad_(False)
    adapter.get_submodule("out_proj").requires_grad_(True)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    tuned = fine_tune(image_features, labels, text_features=text_features, adapter=adapter, epochs=1)
    assert same(adapter, before)
    changed = {name for name, value in tuned.adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"out_proj.weight", "out_proj.bias"}


def test_an_adapter_with_hooks_is_trained_as_a_module(problem: Problem) -> None:
    image_features, labels, text_features = problem
    plain, hooked = RationalAdapter(AdapterConfig.official(16)), RationalAdapter(AdapterConfig.official(16))
    hooked.load_state_dict(plain.state_dict())
    hooked.get_submodule("k_proj").register_forward_hook(lambda module, args, output: None)
    results = [
        fine_tune(image_features, labels, text_features=text_features, adapter=adapter, epochs=1, batch_size=8)
        for adapter in (plain, hooked)
    ]
    for value, expected in zip(results[0].adapter.parameters(), results[1].adapter.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels must be given"),
        ({"labels": torch.zeros(3)}, r"labels must be \(40,\) as train has rows, got \(3,\)"),
        ({"labels": torch.zeros(40)}, "labels must be whole numbers, got torch.float32"),
        ({"labels": torch.full((40,), 9)}, "labels must be below the number of classes 5, got 9"),
        ({"labels": torch.full((40,), -1)}, "labels must not be negative, got -1"),
        ({"train": torch.zeros(40)}, r"train must be features \(N, D\) with N >= 1, got \(40,\)"),
        ({"train": torch.full((40, 16), torch.nan)}, "train must hold finite numbers"),
        ({"train": torch.zeros(40, 16).long()}, "train must be floating point, got torch.int64"),
        ({"train": "features:nowhere.npz", "labels": None}, "nowhere.npz"),
        ({"train": "features:nowhere.npz"}, "labels belong to features in memory"),
        ({"text_features": None}, "model must be given, because images or prompts have to be encoded"),
        ({"text_features": torch.eye(5, 8)}, "text_features must have the adapter's width D = 16"),
        ({"text_features": torch.eye(5, 16) / 0}, r"text_features must be finite numbers \(K, D\)"),
        ({"text_features": "prompts"}, r"text_features must be a tensor \(K, D\), class-means or None, got 'prompts'"),
        ({"class_names": ["a"]}, "text_features must have a row for each of the 1 class names, got 5"),
        ({"adapter": AdapterConfig.official(32)}, "adapter has width 32, the text features have 16"),
        ({"setting": "ttt"}, "setting must be eft or fft, got 'ttt'"),
        ({"train_views": "crop"}, "train_views crop needs images, and train holds features"),
        ({"setting": "fft", "stages": "both"}, "stages both trains the image encoder and needs images"),
        ({"micro_batch": 3}, "fine_tune has no option 'micro_batch' for setting 'eft'; it has batch_size, epochs, lr"),
        ({"epochs": 0}, "epochs must be"),
        ({"penalty": "l3"}, "penalty must be"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(problem: Problem, changes: dict[str, Any], message: str) -> None:
    image_features, labels, text_features = problem
    arguments = {"train": image_features, "labels": labels, "text_features": text_features} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        fine_tune(**arguments)
