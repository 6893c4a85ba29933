"""A run is identified by everything that it reads, so that old results never come back as new ones."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rada_fast.config.commands import EFTOptions, FFTOptions, TTTOptions
from rada_fast.config.method import AdapterConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.engine.episodes import Adaptation
from rada_fast.errors import UserError
from rada_fast.loops.eft import run_eft
from rada_fast.loops.fft import run_fft
from rada_fast.loops.ttt import run_ttt
from rada_fast.models import vision_language
from rada_fast.modules import RationalAdapter, save_adapter
from rada_fast.reports.summary import show
from rada_fast.system import notices

from .support import eft_options, features_file, fft_options, lines, text_file, ttt_options

pytestmark = pytest.mark.usefixtures("tiny")


def tear(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:40])


def test_the_output_must_not_be_the_data(specks: Path, tmp_path: Path) -> None:
    before = sorted(specks.rglob("*"))
    for output in (specks, specks / "cat", specks / "results"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="output"):
                run_ttt(ttt_options(specks, output, run={"overwrite": overwrite}))
    # The folder around the data holds a folder that no run made.
    with pytest.raises(UserError, match="it holds specks"):
        run_ttt(ttt_options(specks, tmp_path, run={"overwrite": True}))
    assert sorted(specks.rglob("*")) == before


def small_features(tmp_path: Path, label_shift: int = 0) -> str:
    """Write three equal features of each of three classes, which their text features tell apart without an error."""
    return features_file(tmp_path / "f.npz", 3, 3, noise=0.0, label_shift=label_shift)


@pytest.mark.parametrize("command", ["ttt", "eft", "fft"])
def test_other_arrays_under_the_same_names_are_another_run(tmp_path: Path, command: str) -> None:
    data, text = small_features(tmp_path), text_file(tmp_path / "t.npz", 3)
    options, run = ClassOptions(text_features=text, logit_scale=100.0), RunOptions(output=str(tmp_path / "run"))
    means = ClassOptions(text_features="class-means", logit_scale=100.0)

    def start() -> dict[str, Any]:
        if command == "ttt":
            return run_ttt(TTTOptions(data=data, text=options, run=run))
        if command == "eft":
            return run_eft(
                EFTOptions(train=data, test=data, protocol="all", text=options, epochs=2, batch_size=9, run=run)
            )
        return run_fft(
            FFTOptions(train=data, test=(data,), stages="first", text=means, epochs=1, finetune_from=1, run=run)
        )

    start()
    again = start()
    assert again["resumed"] > 0
    small_features(tmp_path, label_shift=1)
    part = "data" if command == "ttt" else "train"
    with pytest.raises(UserError, match=rf"differing: {part}, replaced: labels\)"):
        start()
    small_features(tmp_path)
    assert start() == again  # the same arrays, whatever the file's time
    if command != "fft":
        text_file(tmp_path / "t.npz", 3, seed=1)
        with pytest.raises(UserError, match=r"differing: text features\)"):
            start()


def test_overwriting_a_run_reads_the_new_arrays(tmp_path: Path) -> None:
    text = ClassOptions(text_features=text_file(tmp_path / "t.npz", 3), logit_scale=100.0)
    found = []
    for label_shift in (0, 1):
        data = small_features(tmp_path, label_shift)
        run = RunOptions(output=str(tmp_path / "run"), overwrite=bool(label_shift))
        summary = run_ttt(TTTOptions(data=data, text=text, run=run))
        found.append((summary["zero_shot_top1"], summary["resumed"]))
    assert found == [(100.0, 0), (0.0, 0)]


def test_lines_that_do_not_fit_the_runs_images_are_made_again(specks: Path, tmp_path: Path) -> None:
    """Lines of another program, an edited label or an image's line twice cause no traceback and no wrong number."""
    data, path = ttt_options(specks, tmp_path / "run"), tmp_path / "run" / "images.jsonl"
    run_ttt(data)
    complete = lines(tmp_path / "run")
    for first in (
        {"id": complete[0]["id"]},
        complete[0] | {"label": 1},
        complete[0] | {"status": "weird"},
        complete[0] | {"adapted": None},
        complete[1],
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in [first, *complete[1:]]))
        (tmp_path / "run" / "summary.json").unlink()
        assert run_ttt(data)["images"] == 4
        assert sorted(lines(tmp_path / "run"), key=str) == sorted(complete, key=str)


def test_a_run_whose_weights_are_missing_or_torn_is_not_finished(specks: Path, tmp_path: Path) -> None:
    config, weights = eft_options(specks, specks, tmp_path / "run"), tmp_path / "run" / "adapter.safetensors"
    run_eft(config)
    complete = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file itself is torn below
    weights.write_bytes(weights.read_bytes()[:99])
    for _ in range(2):
        run_eft(config)
        again = load_file(weights)
        assert all(torch.equal(tensor, again[name]) for name, tensor in complete.items())
        weights.unlink()
    (tmp_path / "run" / "images.jsonl").unlink()
    run_eft(config)
    assert len(lines(tmp_path / "run")) == 4


def test_renamed_folders_that_shift_labels_make_another_run(specks: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", features=np.eye(2, 16, dtype=np.float32), labels=np.arange(2))
    text = ClassOptions(text_features=f"features:{tmp_path / 't.npz'}", logit_scale=100.0)
    config = dataclasses.replace(ttt_options(specks, tmp_path / "run"), text=text)
    run_ttt(config)
    (specks / "cat").rename(specks / "zebra")
    assert run_ttt(config)["resumed"] == 0  # "dog" was class 1 and is class 0 now
    labels = {line["id"]: line["label"] for line in lines(tmp_path / "run")}
    assert labels == {"dog/0.png": 0, "dog/1.png": 0, "zebra/0.png": 1, "zebra/1.png": 1}


def test_names_templates_adapters_and_weights_are_part_of_a_run(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, templates, adapter = (tmp_path / name for name in ("names.txt", "templates.txt", "a.safetensors"))
    names.write_text("tabby\nhound\n")
    templates.write_text("a picture of a {}.\n")
    save_adapter(RationalAdapter(AdapterConfig.official(16)), adapter)
    config = dataclasses.replace(
        ttt_options(specks, tmp_path / "run"),
        text=ClassOptions(classes=str(names), templates=(str(templates),)),
        adapter=AdapterOptions(adapter=str(adapter)),
    )
    run_ttt(config)
    for path in (names, templates, adapter):
        os.utime(path, (1, 1))
    assert run_ttt(config)["resumed"] == 4  # the content decides, not the time

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=rf"differing: {match}\)"):
            run_ttt(config)

    before = {path: path.read_bytes() for path in (names, templates, adapter)}
    names.write_text("hound\ntabby\n")
    refused("class names")
    names.write_bytes(before[names])
    templates.write_text("a photo of a {}.\n")
    refused("templates")
    templates.write_bytes(before[templates])
    other = RationalAdapter(AdapterConfig.official(16))
    torch.nn.init.ones_(other.get_parameter("k_proj.bias"))
    save_adapter(other, adapter)
    refused("adapter file")
    adapter.write_bytes(before[adapter])
    load = vision_language.load_model

    def load_other(*args: Any, **kwargs: Any) -> Any:
        vlm = load(*args, **kwargs)
        vlm.fingerprint = "weights that were written over the old ones"
        return vlm

    monkeypatch.setattr(vision_language, "load_model", load_other)
    refused("model")


def test_ttt_goes_on_with_added_and_changed_pictures(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn, output = specks / "cat" / "0.png", tmp_path / "run"
    complete = torn.read_bytes()
    tear(torn)
    first = run_ttt(ttt_options(specks, output))
    assert (first["images"], first["unreadable"]) == (4, 1)

    torn.write_bytes(complete)  # repaired
    shutil.copy(specks / "dog" / "1.png", specks / "dog" / "2.png")  # added
    shutil.copy(specks / "cat" / "0.png", specks / "dog" / "0.png")  # replaced
    (specks / "cat" / "1.png").unlink()  # removed
    adapted: list[int] = []
    original = Adaptation.__call__

    def count(adaptation: Adaptation, views: Any, **kwargs: Any) -> Any:
        adapted.append(len(views))
        return original(adaptation, views, **kwargs)

    monkeypatch.setattr(Adaptation, "__call__", count)
    second = run_ttt(ttt_options(specks, output))
    assert sum(adapted) == 3
    assert (second["images"], second["unreadable"], second["resumed"]) == (4, 0, 1)
    assert sorted(line["id"] for line in lines(output)) == ["cat/0.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    superseded = lines(output, "images-superseded.jsonl")
    assert sorted(line["id"] for line in superseded) == ["cat/0.png", "cat/1.png", "dog/0.png"]
    fresh = run_ttt(ttt_options(specks, tmp_path / "fresh"))
    assert sorted(lines(output), key=str) == sorted(lines(tmp_path / "fresh"), key=str)
    assert (second["zero_shot_top1"], second["adapted_top1"]) == (fresh["zero_shot_top1"], fresh["adapted_top1"])


def test_ttt_with_a_new_class_is_another_run(specks: Path, tmp_path: Path) -> None:
    run_ttt(ttt_options(specks, tmp_path / "run"))
    shutil.copytree(specks / "dog", specks / "emu")
    with pytest.raises(UserError, match=r"differing: class names\)"):
        run_ttt(ttt_options(specks, tmp_path / "run"))


def test_a_summary_covers_the_images_of_its_command(specks: Path, tmp_path: Path) -> None:
    assert run_ttt(ttt_options(specks, tmp_path / "run"))["images"] == 4
    some = run_ttt(ttt_options(specks, tmp_path / "run", run={"limit": 2}))
    assert (some["images"], some["resumed"], some["time"]["images_per_second"]) == (2, 2, None)
    assert len(lines(tmp_path / "run")) == 4
    assert run_ttt(ttt_options(specks, tmp_path / "run"))["images"] == 4


def test_a_finished_command_keeps_its_summary(specks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs: dict[str, tuple[Any, Any]] = {
        "ttt": (run_ttt, ttt_options(specks, tmp_path / "ttt")),
        "eft": (run_eft, eft_options(specks, specks, tmp_path / "eft")),
        "fft": (run_fft, fft_options(specks, specks, tmp_path / "fft")),
    }
    for name, (run, config) in runs.items():
        first = run(config)
        assert first["time"]["images_per_second"] > 0
        kept = {path: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "run.lock"}
        second = run(config)
        assert second["time"] == first["time"]
        assert "is finished" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in kept} == kept


def test_fft_with_another_limit_is_another_run(specks: Path, tmp_path: Path) -> None:
    run_fft(fft_options(specks, specks, tmp_path / "run", run={"limit": 2}))
    with pytest.raises(
        UserError, match=r"differing: --limit 2 there, not given here; train, added: cat/1.png, dog/1.png"
    ):
        run_fft(fft_options(specks, specks, tmp_path / "run"))
    # A limit that leaves nothing out changes nothing.
    assert run_fft(fft_options(specks, specks, tmp_path / "all"))["training_images"] == 4
    assert run_fft(fft_options(specks, specks, tmp_path / "all", run={"limit": 4}))["resumed"] == 2


@pytest.mark.parametrize("command", ["eft", "fft"])
def test_changed_training_pictures_make_another_run_and_changed_test_pictures_are_tested_again(
    specks: Path, tmp_path: Path, command: str
) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    shutil.copytree(specks, train)
    shutil.copytree(specks, test)
    run: Any = run_eft if command == "eft" else run_fft
    config: Any = (eft_options if command == "eft" else fft_options)(train, test, tmp_path / "run")
    tear(test / "cat" / "0.png")
    first = run(config)
    assert first["unreadable"] == 1
    weights = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")}

    shutil.copy(specks / "cat" / "0.png", test / "cat" / "0.png")
    shutil.copy(specks / "cat" / "0.png", test / "cat" / "9.png")
    second = run(config)
    assert second["unreadable"] == 0
    assert len([line for line in lines(tmp_path / "run") if line["id"] == "cat/9.png"]) == (
        1 if command == "eft" else 2
    )
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")} == weights
    assert second["time"]["training_seconds"] == first["time"]["training_seconds"]

    os.utime(train / "cat" / "0.png", (1, 1))
    with pytest.raises(UserError, match=r"differing: train, replaced: cat/0.png\)"):
        run(config)
    if command == "eft":
        # A run that also tests after epochs writes the results into epochs.jsonl, which depends on the test pictures.
        each = dataclasses.replace(config, evaluate_every=1, run=RunOptions(output=str(tmp_path / "each")))
        run(each)
        (test / "cat" / "9.png").unlink()
        with pytest.raises(UserError, match=r"differing: test, removed: cat/9.png\)"):
            run(each)


@pytest.mark.parametrize("views", ["center", "crop"])
@pytest.mark.parametrize("command", ["eft", "fft"])
def test_unreadable_training_pictures_are_recorded_and_end_with_status_3(
    specks: Path, tmp_path: Path, command: str, views: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test"
    shutil.copytree(specks, test)
    tear(specks / "cat" / "0.png")
    run: Any = run_eft if command == "eft" else run_fft
    config: Any = (eft_options if command == "eft" else fft_options)(specks, test, tmp_path / "run", train_views=views)
    for _ in range(2):  # and a finished run says so again
        summary = run(config)
        assert summary["unreadable"] == 1
        (record,) = [line for line in lines(tmp_path / "run") if line["status"] == "unreadable"]
        assert record["id"] == "cat/0.png"
        assert "cannot be read" in record["error"]
        assert show(summary, config.run) == 3
        assert "1 images could not be read" in capsys.readouterr().err
    assert show(summary, dataclasses.replace(config.run, allow_unreadable=1)) == 0

    for picture in specks.rglob("*.png"):
        tear(picture)
    for output in ("all", "again"):
        torn: Any = dataclasses.replace(config, run=RunOptions(output=str(tmp_path / output)))
        with pytest.raises(UserError, match=r"specks: none of the \d images could be read; the first: .*png cannot"):
            run(torn)


def test_widths_are_compared_before_anything_is_trained(specks: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", features=np.eye(32, dtype=np.float32)[:2], labels=np.arange(2))
    text = ClassOptions(text_features=f"features:{tmp_path / 'wide.npz'}")
    for run, config in (
        (run_ttt, ttt_options(specks, tmp_path / "run")),
        (run_eft, eft_options(specks, specks, tmp_path / "run")),
        (run_fft, fft_options(specks, specks, tmp_path / "run")),
    ):
        with pytest.raises(UserError, match="rows of width 32, model tiny makes features of width 16"):
            run(dataclasses.replace(config, text=text))  # type: ignore[operator, type-var]
    wide = f"features:{tmp_path / 'wide.npz'}"
    narrow = features_file(tmp_path / "f.npz")
    text = ClassOptions(text_features="class-means", logit_scale=100.0)
    config = FFTOptions(train=narrow, test=(wide,), stages="first", text=text, run=RunOptions(str(tmp_path / "run")))
    with pytest.raises(UserError, match="has features of width 32, the text features have 16"):
        run_fft(config)
    assert not (tmp_path / "run").exists()


def test_the_summary_holds_the_warnings_of_the_run(specks: Path, tmp_path: Path) -> None:
    run_eft(eft_options(specks, specks, tmp_path / "run"))
    (tmp_path / "run" / "state.pt").write_bytes(b"PK")
    (tmp_path / "run" / "summary.json").unlink()
    with notices.collecting():
        summary = run_eft(eft_options(specks, specks, tmp_path / "run"))
    assert any("state.pt is damaged" in line for line in summary["warnings"])


@pytest.mark.usefixtures("tiny")
def test_halves_of_classes_without_an_image_are_refused(specks: Path, tmp_path: Path) -> None:
    for part, empty in (("no-new", "dog"), ("no-base", "cat")):
        shutil.copytree(specks, tmp_path / part)
        for path in (tmp_path / part / empty).iterdir():
            path.unlink()
    for train, test, message in (
        (specks, tmp_path / "no-new", "test .* has no image of the new classes"),
        (tmp_path / "no-base", specks, "train .* has no image of the base classes"),
    ):
        with pytest.raises(UserError, match=message):
            run_eft(eft_options(train, test, tmp_path / "run", protocol="base-to-new"))
