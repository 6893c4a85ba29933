"""The three loops give the right results on small drawn images and on features, and go on after an interruption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rada_fast import _env
from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import MASK_PENALTIES, EpisodeConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, ModelOptions, RunOptions
from rada_fast.embedded import world
from rada_fast.engine import full_training
from rada_fast.engine import training as training_engine
from rada_fast.engine.episodes import Adaptation
from rada_fast.engine.full_training import Stage, learning_rate
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.modules import RationalAdapter, load_adapter, save_adapter
from rada_fast.system import notices

from .support import eft_options, features_file, fft_options, lines, text_file, ttt_options

CLASSES = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw three shifted pictures of each of six classes, half of which are new."""
    everything, root = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("pictures")
    world.write_imagefolder(everything, 3, seed=1, shift="mixed")
    folders = sorted(path for path in everything.iterdir())
    for folder in folders[:3] + folders[-3:]:
        shutil.copytree(folder, root / folder.name)
    return root


ttt = partial(ttt_options, views=8, episode=EpisodeConfig(steps=2))
eft = partial(eft_options, epochs=3, batch_size=4)


def test_ttt_writes_a_line_per_image_and_a_summary(pictures: Path, tmp_path: Path) -> None:
    summary = run_ttt(ttt(pictures, tmp_path / "run"))
    records = lines(tmp_path / "run")
    assert sorted(record["id"] for record in records) == [
        path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("*.png"))
    ]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text()) | {"config": summary["config"]}
    assert summary["images"] == 18
    assert summary["status"] == {"ok": 18, "diverged": 0, "unreadable": 0}
    right = sum(record["adapted"][0] == record["label"] for record in records)
    assert summary["adapted_top1"] == round(100 * right / 18, 3)
    for record in records:
        assert record["label_name"] == record["id"].partition("/")[0].replace("_", " ")
        assert record["zero_shot_names"][0] in {other["label_name"] for other in records}
        pairs = zip(record["adapted"], record["adapted_names"], strict=True)
        assert all(name == record["label_name"] for label, name in pairs if label == record["label"])
    assert summary["adapted_top5"] >= summary["adapted_top1"]
    assert summary["preset"] == "official"
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["peak_memory"]["process_mib"] > 0
    assert summary["time"]["images_per_second"] > 0


def test_ttt_lines_do_not_depend_on_order_episodes_or_workers(pictures: Path, tmp_path: Path) -> None:
    runs = {
        "plain": ttt(pictures, tmp_path / "plain"),
        "reordered": ttt(pictures, tmp_path / "reordered", order_seed=3, episodes=5),
        "workers": ttt(pictures, tmp_path / "workers", episodes=1, run={"workers": 2}),
    }
    found = {}
    for name, config in runs.items():
        run_ttt(config)
        found[name] = (tmp_path / name / "images.jsonl").read_text()
    assert found["reordered"] == found["workers"] == found["plain"]


def test_ttt_goes_on_where_it_was_interrupted(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ttt(ttt(pictures, tmp_path / "complete"))
    calls = 0
    original = Adaptation.__call__

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(Adaptation, "__call__", interrupt)
    config = ttt(pictures, tmp_path / "interrupted", episodes=2)
    with pytest.raises(KeyboardInterrupt):
        run_ttt(config)
    assert len(lines(tmp_path / "interrupted")) == 8
    # The crash also tore the last line.
    path = tmp_path / "interrupted" / "images.jsonl"
    path.write_text(path.read_text()[:-10])
    summary = run_ttt(config)
    assert summary["resumed"] == 7
    assert sorted(map(str, lines(tmp_path / "interrupted"))) == sorted(map(str, lines(tmp_path / "complete")))


def test_ttt_records_unreadable_images_and_counts_them(pictures: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pictures, damaged)
    victim = next(iter(sorted(damaged.rglob("*.png"))))
    victim.write_bytes(victim.read_bytes()[:40])
    summary = run_ttt(ttt(damaged, tmp_path / "run"))
    assert summary["status"]["unreadable"] == 1
    assert summary["images"] == 18
    (record,) = [record for record in lines(tmp_path / "run") if record["status"] == "unreadable"]
    assert record["id"] == victim.relative_to(damaged).as_posix()
    assert "cannot be read" in record["error"]


def test_ttt_with_file_names_in_any_encoding(pictures: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(pictures, odd)
    victims = sorted(odd.rglob("*.png"))[:2]
    for victim, name in zip(
        victims, ("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n.png", os.fsdecode(b"\xff\xfe.png")), strict=True
    ):
        victim.rename(victim.with_name(name))
    summary = run_ttt(ttt(odd, tmp_path / "run"))
    assert summary["status"]["ok"] == 18
    assert run_ttt(ttt(odd, tmp_path / "run"))["resumed"] == 18
    assert any(record["id"].endswith(os.fsdecode(b"\xff\xfe.png")) for record in lines(tmp_path / "run"))


def test_ttt_without_labels_and_with_augmix(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(world.class_names()[:7]))
    config = dataclasses.replace(
        ttt(pictures, tmp_path / "run", view_kind="augmix", text=ClassOptions(classes=str(tmp_path / "names.txt"))),
        data=f"images:{pictures}",
    )
    summary = run_ttt(config)
    assert summary["adapted_top1"] is None
    assert {record["label"] for record in lines(tmp_path / "run")} == {None}
    with pytest.raises(UserError, match="classes must be given"):
        run_ttt(dataclasses.replace(config, text=ClassOptions()))


def test_ttt_starts_from_a_trained_adapter_and_from_the_paper_preset(pictures: Path, tmp_path: Path) -> None:
    adapter = RationalAdapter(AdapterOptions().resolve(512))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.05)
    save_adapter(adapter, tmp_path / "a.safetensors")
    options = AdapterOptions(adapter=str(tmp_path / "a.safetensors"))
    trained = run_ttt(ttt(pictures, tmp_path / "trained", adapter=options))
    paper = run_ttt(ttt(pictures, tmp_path / "paper", adapter=AdapterOptions(preset="paper")))
    assert (trained["preset"], paper["preset"]) == ("official", "paper")
    assert lines(tmp_path / "trained") != lines(tmp_path / "paper")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_without_instructions_is_replaced_by_float32(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    run_ttt(ttt(pictures, tmp_path / "plain", run={"limit": 2}))
    low = ModelOptions(precision=precision)  # type: ignore[arg-type]
    monkeypatch.setattr(_env, "has_native_products", lambda dtype: dtype == "float32")
    with notices.collecting():
        summary = run_ttt(ttt(pictures, tmp_path / "low", model=low, run={"limit": 2}))
    assert lines(tmp_path / "low") == lines(tmp_path / "plain")
    assert (summary["model"]["precision_asked"], summary["model"]["precision"]) == (precision, "float32")
    (warning,) = (line for line in summary["warnings"] if "--precision" in line)
    assert warning.startswith(f"--precision {precision}: this processor has no instructions for {precision} products")
    # The same option on another processor is another run, because the features kept here were computed in float32.
    monkeypatch.setattr(_env, "has_native_products", lambda dtype: True)
    with pytest.raises(UserError, match="precision"):
        run_ttt(ttt(pictures, tmp_path / "low", model=low, run={"limit": 2}))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_loop_runs_on_a_gpu(pictures: Path, tmp_path: Path, precision: str) -> None:
    model = ModelOptions(device="cuda", precision=precision)  # type: ignore[arg-type]
    spec = f"imagefolder:{pictures}"
    assert run_ttt(ttt(pictures, tmp_path / "ttt", model=model))["status"]["ok"] == 18
    assert run_eft(eft(pictures, pictures, tmp_path / "eft", model=model))["base"]["images"] == 9
    config = fft_options(pictures, pictures, tmp_path / "fft", batch_size=9, model=model)
    assert run_fft(config)["rada-ft"][spec]["images"] == 18


@pytest.mark.parametrize("views", [None, 7])
def test_ttt_runs_on_features(tmp_path: Path, views: int | None) -> None:
    config = TTTOptions(
        data=features_file(tmp_path / "f.npz", views=views),
        text=ClassOptions(text_features=text_file(tmp_path / "t.npz")),
        run=RunOptions(output=str(tmp_path / "run")),
    )
    summary = run_ttt(config)
    assert summary["images"] == 60
    assert summary["model"] is None
    assert summary["zero_shot_top1"] > 50


def test_ttt_keeps_the_zero_shot_answer_where_an_episode_diverges(tmp_path: Path) -> None:
    config = TTTOptions(
        data=features_file(tmp_path / "f.npz", each=1, views=4),
        text=ClassOptions(text_features=text_file(tmp_path / "t.npz")),
        episode=EpisodeConfig(lr=1e30, optimizer="sgd", steps=3),
        adapter=AdapterOptions(num_heads=2),
        run=RunOptions(output=str(tmp_path / "run")),
    )
    summary = run_ttt(config)
    assert summary["status"]["diverged"] > 0
    for record in lines(tmp_path / "run"):
        if record["status"] == "diverged":
            assert record["adapted"] == record["zero_shot"]


def test_eft_trains_on_base_and_tests_base_and_new(pictures: Path, tmp_path: Path) -> None:
    summary = run_eft(eft(pictures, pictures, tmp_path / "run", evaluate_every=1))
    assert summary["training_images"] == 9
    assert summary["base"]["images"] == summary["new"]["images"] == 9
    base, new = summary["base"]["adapted_top1"], summary["new"]["adapted_top1"]
    assert summary["adapted_harmonic_mean"] == pytest.approx(2 * base * new / (base + new), abs=1e-3)
    epochs = lines(tmp_path / "run", "epochs.jsonl")
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert [epoch["lr"] for epoch in epochs] == pytest.approx([1e-5, 0.75 * 9e-4, 0.25 * 9e-4])
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert {record["split"] for record in lines(tmp_path / "run")} == {"base", "new"}
    assert load_adapter(tmp_path / "run" / "adapter.safetensors").config.embed_dim == 512


@pytest.mark.parametrize("train_views", ["center", "crop"])
def test_eft_goes_on_to_the_same_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_views: str
) -> None:
    run_eft(eft(pictures, pictures, tmp_path / "complete", train_views=train_views))
    original = training_engine.epoch_name

    def interrupt(stage: str | None, epoch: int) -> str:
        if epoch == 2:
            raise KeyboardInterrupt
        return original(stage, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(training_engine, "epoch_name", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_eft(eft(pictures, pictures, tmp_path / "interrupted", train_views=train_views))
    summary = run_eft(eft(pictures, pictures, tmp_path / "interrupted", train_views=train_views))
    assert summary["resumed"] == 2
    complete, resumed = (load_adapter(tmp_path / name / "adapter.safetensors") for name in ("complete", "interrupted"))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in complete.state_dict().items())
    assert len(lines(tmp_path / "interrupted", "epochs.jsonl")) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("penalty", MASK_PENALTIES)
def test_eft_on_features_with_every_optimiser_and_penalty(tmp_path: Path, optimizer: str, penalty: str) -> None:
    spec = features_file(tmp_path / "f.npz")
    config = EFTOptions(
        train=spec, test=spec, protocol="all", epochs=2, batch_size=10, schedule="constant", shots=None,
        text=ClassOptions(text_features="class-means"), run=RunOptions(output=str(tmp_path / "run")),
        optimizer=optimizer, penalty=penalty,  # type: ignore[arg-type]
    )  # fmt: skip
    summary = run_eft(config)
    assert summary["test"]["images"] == 60
    assert summary["test"]["zero_shot_top1"] > 50


def test_eft_tests_new_classes_from_data_of_their_own(tmp_path: Path) -> None:
    train, new = features_file(tmp_path / "a.npz"), features_file(tmp_path / "b.npz", classes=3)
    config = EFTOptions(
        train=train, test=train, new_test=new, protocol="all", epochs=1, batch_size=10,
        text=ClassOptions(text_features="class-means"), run=RunOptions(output=str(tmp_path / "run")),
    )  # fmt: skip
    summary = run_eft(config)
    assert summary["base"]["classes"] == 5
    assert summary["new"]["classes"] == 3


def test_fft_trains_both_stages_and_goes_on(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"imagefolder:{pictures}"
    subset = tmp_path / "subset"
    for name in sorted(path.name for path in pictures.iterdir())[2:5]:
        shutil.copytree(pictures / name, subset / name)

    def config(output: str) -> FFTOptions:
        return fft_options(
            pictures, pictures, tmp_path / output, test=(spec, f"imagefolder:{subset}"), epochs=2, finetune_epochs=2,
            finetune_lr=1e-4, batch_size=9, micro_batch=5,
        )  # fmt: skip

    summary = run_fft(config("complete"))
    for stage in ("rada", "rada-ft"):
        assert summary[stage][spec]["images"] == 18
        assert summary[stage][f"imagefolder:{subset}"]["images"] == 9
    # Predictions on data with some of the classes are among those classes, with the labels of training.
    records = [r for r in lines(tmp_path / "complete") if r["test"] == f"imagefolder:{subset}"]
    assert {record["label"] for record in records} == {2, 3, 4}
    assert all(set(record["adapted"][:3]) <= {2, 3, 4} for record in records)
    stages = [(line["stage"], line["epoch"]) for line in lines(tmp_path / "complete", "epochs.jsonl")]
    assert stages == [("rada", 1), ("rada", 2), ("rada-ft", 1), ("rada-ft", 2)]

    original = learning_rate

    def interrupt(stage: Stage, *args: Any) -> float:
        if stage.name == "rada-ft" and args[1] == 2:
            raise KeyboardInterrupt
        return original(stage, *args)

    with monkeypatch.context() as patch:
        patch.setattr(full_training, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_fft(config("interrupted"))
    assert run_fft(config("interrupted"))["resumed"] == 3
    for name in ("rada", "rada-ft"):
        complete, resumed = (
            load_adapter(tmp_path / run / f"{name}-adapter.safetensors") for run in ("complete", "interrupted")
        )
        assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in complete.state_dict().items())
    complete, resumed = (load_file(tmp_path / run / "rada-ft-model.safetensors") for run in ("complete", "interrupted"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in complete.items())
    assert any(key.startswith("visual.") for key in complete)


def test_fft_on_features_runs_the_first_stage_only(tmp_path: Path) -> None:
    spec = features_file(tmp_path / "f.npz")
    config = FFTOptions(
        train=spec, test=(spec,), stages="first", epochs=3, finetune_from=2, batch_size=20,
        text=ClassOptions(text_features="class-means"), run=RunOptions(output=str(tmp_path / "run")),
    )  # fmt: skip
    summary = run_fft(config)
    assert summary["rada"][spec]["images"] == 60
    with pytest.raises(UserError, match="stages both trains the image encoder and needs images"):
        run_fft(dataclasses.replace(config, stages="both"))


@pytest.mark.parametrize("command", ["eft", "fft"])
def test_a_runs_folder_stands_for_its_adapter(tmp_path: Path, command: str) -> None:
    spec, texts = features_file(tmp_path / "f.npz"), text_file(tmp_path / "t.npz")
    run, text = RunOptions(output=str(tmp_path / command)), ClassOptions(text_features=texts)
    if command == "eft":
        run_eft(EFTOptions(train=spec, test=spec, protocol="all", epochs=1, text=text, run=run))
    else:
        run_fft(FFTOptions(train=spec, test=(spec,), stages="first", epochs=1, finetune_from=1, text=text, run=run))
    file = {"eft": "adapter.safetensors", "fft": "rada-adapter.safetensors"}[command]
    found = []
    for place in (tmp_path / command, tmp_path / command / file):
        ttt_run = RunOptions(output=str(tmp_path / f"ttt {place.name}"), limit=3)
        run_ttt(TTTOptions(data=spec, text=text, adapter=AdapterOptions(adapter=str(place)), run=ttt_run))
        found.append(lines(tmp_path / f"ttt {place.name}"))
    assert found[0] == found[1]


def test_learning_rates_warm_up_and_decay() -> None:
    stage = Stage("rada", 2, 1.0, 1.0, trains_encoder=False)
    rates = [learning_rate(stage, 4, step, 40) for step in range(40)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[4:]))
    short = [learning_rate(stage, 4, step, 5) for step in range(5)]
    assert short[0] == 1.0
