"""eval and predict compute with everything that a method of eft or fft has trained, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rada_fast.config.commands import EFTOptions
from rada_fast.config.inference import EvalOptions, PredictOptions
from rada_fast.config.methods import EFT_METHODS, FFT_METHODS
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions, TuningOptions
from rada_fast.embedded import world
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.evaluate import logits_of_rows
from rada_fast.loops.evaluation import run_eval
from rada_fast.loops.fft import run_fft
from rada_fast.loops.prediction import run_predict
from rada_fast.loops.ttt import run_ttt
from rada_fast.models.vision_language import load_model

from .support import eft_options, features_file, fft_options, lines, text_file, ttt_options

TUNING = TuningOptions(context_tokens=2, prompt_depth=2, adapter_depth=1, adapter_width=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw two pictures of each of four classes."""
    everything, root = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("pictures")
    world.write_imagefolder(everything, 2, seed=1, shift=None)
    for folder in sorted(everything.iterdir())[:4]:
        shutil.copytree(folder, root / folder.name)
    return root


def evaluated(adapter: Path, output: Path, *data: str, **changes: Any) -> dict[str, Any]:
    return run_eval(
        EvalOptions(data, run=RunOptions(output=str(output)), adapter=AdapterOptions(adapter=str(adapter)), **changes)
    )


def predicted(adapter: Path, output: Path, data: str, **changes: Any) -> list[str]:
    adapter_options = AdapterOptions(adapter=str(adapter))
    run_predict(PredictOptions(data, run=RunOptions(output=str(output)), adapter=adapter_options, **changes))
    return [line["name"] for line in lines(output, "predictions.jsonl")]


@pytest.mark.parametrize("method", [name for name, row in EFT_METHODS.items() if row.tuning is not None])
def test_eval_and_predict_give_what_eft_measured_with_tuned_encoders(
    pictures: Path, tmp_path: Path, method: Any
) -> None:
    spec = f"imagefolder:{pictures}"
    options = {"method": method, "tuning": TUNING, "lr": 0.1, "schedule": "constant", "protocol": "all"}
    summary = run_eft(eft_options(pictures, pictures, tmp_path / "eft", batch_size=4, **options))
    # The file itself stands for the run too.
    for adapter in (tmp_path / "eft", tmp_path / "eft" / "method.safetensors"):
        assert evaluated(adapter, tmp_path / f"eval {adapter.name}", spec)[spec] == summary["test"]
    trained = lines(tmp_path / "eft")
    assert any(line["confidence"][0] != line["confidence"][1] for line in trained)
    assert [line["confidence"] for line in lines(tmp_path / "eval eft")] == [line["confidence"] for line in trained]
    names = predicted(tmp_path / "eft", tmp_path / "predict", spec)
    assert names == [line["adapted_names"][0] for line in trained]


@pytest.mark.parametrize("method", [name for name, row in EFT_METHODS.items() if row.tuning is None])
def test_eval_and_predict_give_what_eft_measured_on_features(tmp_path: Path, method: Any) -> None:
    data, text = features_file(tmp_path / "f.npz", noise=2.0), text_file(tmp_path / "t.npz", seed=1)
    given = ClassOptions(text_features=text)
    summary = run_eft(EFTOptions(data, data, method=method, protocol="all", epochs=4, lr=1e-2, batch_size=4,
                                 text=given, run=RunOptions(output=str(tmp_path / "eft"))))  # fmt: skip
    assert summary["test"]["adapted_top1"] != summary["test"]["zero_shot_top1"]
    assert evaluated(tmp_path / "eft", tmp_path / "eval", data, text=given)[data] == summary["test"]
    names = predicted(tmp_path / "eft", tmp_path / "predict", data, text=given)
    assert names == [line["adapted_names"][0] for line in lines(tmp_path / "eval")]


@pytest.mark.parametrize("method", FFT_METHODS)
def test_eval_and_predict_give_what_fft_measured(pictures: Path, tmp_path: Path, method: Any) -> None:
    spec, stage = f"imagefolder:{pictures}", FFT_METHODS[method].stages[-1].name
    some = tmp_path / "some"
    for folder in sorted(pictures.iterdir())[1:3]:
        shutil.copytree(folder, some / folder.name)
    subset = f"imagefolder:{some}"
    options = {"method": method, "lr": 1e-2, "finetune_lr": 1e-2, "test": (spec, subset)}
    summary = run_fft(fft_options(pictures, pictures, tmp_path / "fft", **options))
    result = evaluated(tmp_path / "fft", tmp_path / "eval", spec, subset)
    trained = [line for line in lines(tmp_path / "fft") if line.get("stage") == stage]
    for line, again in zip(trained, lines(tmp_path / "eval"), strict=True):
        assert (again["data"], again["id"]) == (line["test"], line["id"])
        assert again["confidence"][1] == pytest.approx(line["confidence"][1], abs=2e-6)
    for one in (spec, subset):
        assert result[one]["adapted_top1"] == summary[stage][one]["adapted_top1"]
    names = predicted(tmp_path / "fft", tmp_path / "predict", spec)
    assert names == [line["adapted_names"][0] for line in trained if line["test"] == spec]
    if method == "flyp":
        return  # its text encoder answers about any classes
    shutil.copytree(some / sorted(folder.name for folder in some.iterdir())[0], some / "zebra")
    with pytest.raises(UserError, match=r"has the class 'zebra', for which the classifier of .* has no row"):
        evaluated(tmp_path / "fft", tmp_path / "other", subset)


def test_classes_with_one_name_are_told_apart_by_their_folders(pictures: Path, tmp_path: Path) -> None:
    some, names = tmp_path / "some", tmp_path / "names.txt"
    folders = sorted(pictures.iterdir())
    for folder in folders[2:]:
        shutil.copytree(folder, some / folder.name)
    names.write_text("dog\nsunglasses\nsunglasses\ncat\n")
    every, text = f"imagefolder:{pictures}", ClassOptions(classes=str(names))
    options = fft_options(pictures, some, tmp_path / "fft", method="lp", lr=1e-2, text=text)
    run_fft(options)
    (tmp_path / "two.txt").write_text("sunglasses\ncat\n")
    two = ClassOptions(classes=str(tmp_path / "two.txt"))
    evaluated(tmp_path / "fft", tmp_path / "eval", f"imagefolder:{some}", text=two)
    for line, again in zip(lines(tmp_path / "fft"), lines(tmp_path / "eval"), strict=True):
        assert again["confidence"][1] == pytest.approx(line["confidence"][1], abs=2e-6)
    evaluated(tmp_path / "fft", tmp_path / "every", every, text=text)
    # Folders that are not those of the training do not say which of the classes with the name is meant.
    (some / folders[2].name).rename(some / "other")
    (tmp_path / "two.txt").write_text("cat\nsunglasses\n")
    with pytest.raises(UserError, match="has other classes than the classifier of"):
        evaluated(tmp_path / "fft", tmp_path / "unknown", f"imagefolder:{some}", text=two)


def test_a_class_stands_for_the_best_of_its_rows() -> None:
    logits = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    assert logits_of_rows(logits, [(3,), (0, 2)]).tolist() == [[4, 3], [1, 4]]


@pytest.mark.parametrize("method", ["ft", "flyp"])
def test_means_of_weights_are_evaluated(pictures: Path, tmp_path: Path, method: Any) -> None:
    spec, run = f"imagefolder:{pictures}", tmp_path / "fft"
    options = fft_options(pictures, pictures, run, method=method, finetune_lr=1e-2, ensemble=(0.0, 0.5))
    run_fft(options)
    for stage in ("ensemble-0.5", method):
        evaluated(run / f"{stage}-model.safetensors", tmp_path / stage, spec)
        trained = [line for line in lines(run) if line.get("stage") == stage]
        for line, again in zip(trained, lines(tmp_path / stage), strict=True):
            assert again["confidence"][1] == pytest.approx(line["confidence"][1], abs=2e-6)
    # These files count as the run's own, so that another run may replace them.
    fresh = RunOptions(output=str(run), overwrite=True)
    run_fft(dataclasses.replace(options, ensemble=(), finetune_lr=1e-3, run=fresh))
    assert not list(run.glob("ensemble-*"))


def test_a_trained_text_encoder_answers_about_classes_that_were_not_trained(pictures: Path, tmp_path: Path) -> None:
    some, other = tmp_path / "some", tmp_path / "other"
    for number, folder in enumerate(sorted(pictures.iterdir())):
        shutil.copytree(folder, (some if number < 2 else other) / folder.name)
    run_fft(fft_options(some, some, tmp_path / "fft", method="flyp", finetune_lr=1e-2))
    trained = evaluated(tmp_path / "fft", tmp_path / "eval", f"imagefolder:{other}")
    assert trained["model"]["pretrained"] == str(tmp_path / "fft" / "flyp-model.safetensors")
    loaded, start = load_model("embedded", str(tmp_path / "fft")), load_model("embedded")
    assert not torch.equal(loaded.encode_texts(["a dog"]), start.encode_texts(["a dog"]))
    again = lines(tmp_path / "eval")
    assert all(line["confidence"][0] == pytest.approx(line["confidence"][1], abs=2e-6) for line in again)
    # A part of the text encoder that is missing is named.
    file = tmp_path / "fft" / "flyp-model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.startswith("text_encoder.")))
    save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"does not fit the model embedded: text_encoder\..* is missing"):
        load_model("embedded", str(file))


@pytest.fixture(scope="module")
def coop(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a context, and return its folder."""
    folder = tmp_path_factory.mktemp("coop")
    run_eft(eft_options(pictures, pictures, folder, method="coop", tuning=TUNING, batch_size=4, epochs=1))
    return folder


@pytest.mark.parametrize(
    ("header", "config", "context", "message"),
    [
        (None, {}, None, "does not say its configuration"),
        ({"format": "rada_fast.method.v9"}, {}, None, "has the format 'rada_fast.method.v9'"),
        ({"config": "[" * 5000}, {}, None, "unusable configuration"),
        ({"config": "[]"}, {}, None, "unusable configuration"),
        ({}, {"method": "magic"}, None, "there is no method 'magic' of 'eft'"),
        ({}, {"method": ["coop"]}, None, "unusable configuration"),
        ({}, {"num_heads": 10**30}, None, "num_heads must be from 1 to"),
        ({}, {"embed_dim": 24}, None, "was trained on features of width 24"),
        ({}, {"model": "ViT-B-32"}, None, "trained inside the encoders of the model ViT-B-32"),
        ({}, {"tuning": {"context_tokens": 9000}}, None, "must hold encoders.context with 9000 rows"),
        ({}, {"tuning": None}, None, "do not fit the method coop"),
        ({}, {}, torch.zeros(2, 5), "does not fit the model embedded"),
        ({}, {}, torch.full((2, 5), torch.nan), "must hold finite floating-point numbers"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    pictures: Path, coop: Path, tmp_path: Path, header: Any, config: Any, context: Any, message: str
) -> None:
    shutil.copytree(coop, tmp_path / "run")
    path = tmp_path / "run" / "method.safetensors"
    with safe_open(path, framework="pt") as file:
        stored = file.metadata()
    stored["config"] = json.dumps(json.loads(stored["config"]) | config)
    tensors = load_file(path) if context is None else {"encoders.context": context}
    save_file(tensors, path, None if header is None else stored | header)
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path / "run", tmp_path / "eval", f"imagefolder:{pictures}")


def test_options_that_do_not_fit_a_method_are_refused(pictures: Path, coop: Path, tmp_path: Path) -> None:
    data = f"imagefolder:{pictures}"
    with pytest.raises(UserError, match="--ttt adapts a rational adapter"):
        predicted(coop, tmp_path / "run", data, ttt=True)
    with pytest.raises(UserError, match=r"method coop of .* has no rational adapter"):
        run_eval(EvalOptions((data,), adapter=AdapterOptions(adapter=str(coop), num_layers=2)))
    spec, text = features_file(tmp_path / "f.npz"), text_file(tmp_path / "t.npz")
    with pytest.raises(UserError, match="was trained on features of width"):
        evaluated(coop, tmp_path / "run", spec, text=ClassOptions(text_features=text))


def test_what_is_inside_the_encoders_needs_its_adapter_and_eval(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eft(eft_options(pictures, pictures, tmp_path / "eft", method="rada+prompt", tuning=TUNING, epochs=1))
    adapter = AdapterOptions(adapter=str(tmp_path / "eft"))
    run_ttt(ttt_options(pictures, tmp_path / "ttt", adapter=adapter, run={"limit": 1, "allow_chance": True}))
    assert "this command uses the rational adapter alone" in capsys.readouterr().err
    (tmp_path / "eft" / "adapter.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"needs the rational adapter adapter\.safetensors beside it"):
        evaluated(tmp_path / "eft", tmp_path / "eval", f"imagefolder:{pictures}")
