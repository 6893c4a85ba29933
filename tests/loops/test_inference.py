"""The commands eval, predict and features agree with the loops, and go on after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rada_fast import cli
from rada_fast.config.commands import EFTOptions
from rada_fast.config.inference import EvalOptions, FeaturesOptions, PredictOptions
from rada_fast.config.method import AdapterConfig, EpisodeConfig
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.data.open import open_source
from rada_fast.errors import UserError
from rada_fast.loops import extraction, prediction
from rada_fast.loops.eft import run_eft
from rada_fast.loops.evaluation import run_eval
from rada_fast.loops.extraction import run_features
from rada_fast.loops.prediction import run_predict
from rada_fast.loops.ttt import run_ttt
from rada_fast.modules import RationalAdapter, save_adapter
from rada_fast.reports.results import read_results
from rada_fast.reports.tables import average_rows, set_rows

from .support import features_file, lines, text_file, ttt_options

HEADS = AdapterOptions(num_heads=2)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Save an adapter that changes the answers about the tiny model's features."""
    torch.manual_seed(1)
    adapter = RationalAdapter(AdapterConfig.official(16, num_heads=2))
    torch.nn.init.normal_(adapter.get_parameter("out_proj.weight"), std=0.5)
    save_adapter(adapter, tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


def test_eval_of_a_run_equals_what_eft_measured(tmp_path: Path) -> None:
    data = features_file(tmp_path / "a.npz", classes=4, noise=2)
    other = features_file(tmp_path / "b.npz", classes=4, noise=1)
    text = ClassOptions(text_features=text_file(tmp_path / "text.npz", classes=4, seed=1))
    for seed in (1, 2):
        run = RunOptions(output=str(tmp_path / f"eft{seed}"), seed=seed)
        eft = EFTOptions(data, data, protocol="all", epochs=2, batch_size=4, shots=4, text=text, adapter=HEADS, run=run)
        trained = run_eft(eft)
        options = EvalOptions(
            (data, other),
            run=RunOptions(output=str(tmp_path / "eval" / str(seed))),
            text=text,
            adapter=AdapterOptions(adapter=str(tmp_path / f"eft{seed}")),
        )
        summary = run_eval(options)
        assert summary[data] == trained["test"]
        both = [summary[one]["adapted_top1"] for one in (data, other)]
        assert summary["average_adapted_top1"] == pytest.approx(sum(both) / 2, abs=1e-3)
        assert summary["origin"]["seed"] == seed
        assert run_eval(options)["resumed"] == 2
    assert {line["data"] for line in lines(tmp_path / "eval" / "1")} == {data, other}
    # The seeds of the trainings make the two runs repetitions of each other.
    rows = set_rows(read_results([str(tmp_path / "eval")]))
    assert [(row["data"], row["seeds"], row["trained_on"]) for row in rows] == [
        (data, "1 2", data),
        (other, "1 2", data),
    ]
    (average,) = average_rows(rows)
    assert average["adapted_top1"] == pytest.approx(sum(row["adapted_top1"] for row in rows) / 2)


@pytest.mark.usefixtures("tiny")
def test_eval_gives_every_set_its_own_classes(specks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(specks, tmp_path / "more")
    shutil.copytree(specks / "cat", tmp_path / "more" / "zebra")
    specs = (f"imagefolder:{specks}", f"imagefolder:{tmp_path / 'more'}")
    summary = run_eval(EvalOptions(specs, run=RunOptions(output=str(tmp_path / "run"))))
    assert [summary[spec]["classes"] for spec in specs] == [2, 3]
    assert [summary[spec]["images"] for spec in specs] == [4, 6]
    assert "no --adapter is given" in capsys.readouterr().err
    assert all(line["zero_shot"] == line["adapted"] for line in lines(tmp_path / "run"))
    with pytest.raises(UserError, match="data must name every source once"):
        EvalOptions((specs[0], specs[0]))


def predict_options(data: str, output: Path, **changes: Any) -> PredictOptions:
    return PredictOptions(data, run=RunOptions(output=str(output)), **changes)


@pytest.mark.usefixtures("tiny")
def test_predict_names_the_classes_of_images_without_labels(specks: Path, tmp_path: Path, trained: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    text, adapter = ClassOptions(classes=str(names)), AdapterOptions(adapter=str(trained))
    broken = specks / "broken.png"
    broken.write_bytes(b"no image")
    options = predict_options(f"images:{specks}", tmp_path / "run", text=text, adapter=adapter, top=2)
    summary = run_predict(options)
    assert (summary["images"], summary["unreadable"], summary["by"]) == (5, 1, "adapter")
    records = {record["id"]: record for record in lines(tmp_path / "run", "predictions.jsonl")}
    assert records["broken.png"]["status"] == "unreadable"
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == records.keys()
    # eval, on the same images with labels, gives the same answers.
    broken.unlink()
    (specks / "owl").mkdir()
    run_eval(EvalOptions((f"imagefolder:{specks}",), run=RunOptions(output=str(tmp_path / "eval")), adapter=adapter))
    for line in lines(tmp_path / "eval"):
        own = records[line["id"]]
        assert (own["name"], own["zero_shot_name"]) == (line["adapted_names"][0], line["zero_shot_names"][0])
        assert own["probability"] == pytest.approx(line["confidence"][1], abs=2e-6)
        assert [best["name"] for best in own["best"]] == line["adapted_names"][:2]
        assert rows[line["id"]]["name"] == own["name"]


@pytest.mark.usefixtures("tiny")
def test_predict_by_test_time_training_agrees_with_ttt(specks: Path, tmp_path: Path) -> None:
    episode = EpisodeConfig(steps=1, lr=0.1)
    run_ttt(ttt_options(specks, tmp_path / "ttt", views=4, episode=episode))
    options = predict_options(f"imagefolder:{specks}", tmp_path / "run", ttt=True, views=4, episode=episode)
    assert run_predict(options)["by"] == "test-time training"
    answers = {record["id"]: record for record in lines(tmp_path / "run", "predictions.jsonl")}
    for line in lines(tmp_path / "ttt"):
        assert answers[line["id"]]["name"] == line["adapted_names"][0]
        assert answers[line["id"]]["probability"] == pytest.approx(line["confidence"][1], abs=1e-5)


@pytest.mark.usefixtures("tiny")
def test_predict_goes_on_and_predicts_changed_images_again(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = predict_options(f"imagefolder:{specks}", tmp_path / "run")
    original = prediction.line_of
    left = 2

    def interrupt(*args: Any) -> dict[str, Any]:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return original(*args)

    monkeypatch.setattr(prediction, "line_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_predict(options)
    assert len(lines(tmp_path / "run", "predictions.jsonl")) == 2
    monkeypatch.undo()
    monkeypatch.setattr("rada_fast.models.vision_language.load_model", _tiny())
    assert run_predict(options)["resumed"] == 2
    assert run_predict(options)["resumed"] == 4
    shutil.copyfile(specks / "dog" / "1.png", specks / "cat" / "0.png")
    assert run_predict(options)["resumed"] == 3
    by_id = {record["id"]: record for record in lines(tmp_path / "run", "predictions.jsonl")}
    assert by_id["cat/0.png"]["best"] == by_id["dog/1.png"]["best"]


def _tiny() -> Any:
    from .conftest import load_tiny

    return load_tiny


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("views", [1, 4])
def test_features_are_read_again_and_give_the_same_answers(specks: Path, tmp_path: Path, views: int) -> None:
    data = f"imagefolder:{specks}"
    options = FeaturesOptions(data, views=views, prompts=True, run=RunOptions(output=str(tmp_path / "run")))
    summary = run_features(options)
    assert summary["data"] == f"features:{tmp_path / 'run' / 'features.npz'}"
    source = open_source(summary["data"])
    assert source.ids == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    assert source.class_names == ("cat", "dog")
    assert source.num_views == views
    assert not (tmp_path / "run" / "features.rows").exists()
    assert run_features(options)["resumed"] == 4
    # Test-time training on the features, without a model, agrees with that on the pictures.
    ttt = ttt_options(specks, tmp_path / "pictures", views=views)
    run_ttt(ttt)
    text = ClassOptions(text_features=f"features:{tmp_path / 'run' / 'text.npz'}")
    again = dataclasses.replace(ttt, data=summary["data"], text=text, run=RunOptions(output=str(tmp_path / "again")))
    run_ttt(again)
    for line, other in zip(lines(tmp_path / "pictures"), lines(tmp_path / "again"), strict=True):
        assert line["id"] == other["id"]
        assert line["label_name"] == other["label_name"]
        assert line["confidence"] == pytest.approx(other["confidence"], abs=1e-4)


@pytest.mark.usefixtures("tiny")
def test_features_of_unlabelled_images_can_be_predicted(specks: Path, tmp_path: Path) -> None:
    (specks / "broken.png").write_bytes(b"no image")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    run = RunOptions(output=str(tmp_path / "run"))
    summary = run_features(FeaturesOptions(f"images:{specks}", dtype="float16", run=run))
    assert (summary["images"], summary["unreadable"]) == (5, 1)
    with np.load(tmp_path / "run" / "features.npz") as file:
        assert file["features"].dtype == np.float16
        assert "labels" not in file
    text = ClassOptions(classes=str(names))
    found = run_predict(predict_options(summary["data"], tmp_path / "predict", text=text))
    assert (found["images"], found["unreadable"], found["warnings"]) == (4, 0, [])
    with pytest.raises(UserError, match=r"--data must name data with classes"):
        run_eval(EvalOptions((summary["data"],), run=RunOptions(output=str(tmp_path / "eval")), text=text))


@pytest.mark.usefixtures("tiny")
def test_features_go_on_where_they_were_interrupted(
    specks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FeaturesOptions(f"imagefolder:{specks}", views=64, run=RunOptions(output=str(tmp_path / "whole")))
    run_features(whole)
    options = dataclasses.replace(whole, run=RunOptions(output=str(tmp_path / "cut")))
    original = extraction._batches

    def interrupted(stream: Any, size: int) -> Any:
        for index, batch in enumerate(original(stream, size)):
            if index == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(extraction, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_features(options)
    monkeypatch.setattr(extraction, "_batches", original)
    rows = tmp_path / "cut" / "features.rows"
    rows.write_bytes(rows.read_bytes() + b"half a row")
    assert run_features(options)["resumed"] == 2
    contents = [(tmp_path / name / "features.npz").read_bytes() for name in ("whole", "cut")]
    assert contents[0] == contents[1]


def test_wrong_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = features_file(tmp_path / "a.npz")
    assert cli.main(["features", "--data", data, "--output", str(tmp_path / "run")]) == 2
    assert "--data must be images to be encoded" in capsys.readouterr().err
    assert cli.main(["eval", "--data", "photos"]) == 2
    assert "--data photos: data must be KIND:PATH" in capsys.readouterr().err
    assert cli.main(["features", "--data", data, "--logit-scale", "3"]) == 2
    assert "no use in 'features'" in capsys.readouterr().err
    np.savez(tmp_path / "twice.npz", features=np.ones((2, 4), np.float32), ids=np.array(["a", "a"]))
    with pytest.raises(UserError, match="ids must differ, 1 of 2 repeat"):
        open_source(f"features:{tmp_path / 'twice.npz'}")
    assert json.loads(json.dumps(dataclasses.asdict(PredictOptions("images:a"))))["top"] == 5
