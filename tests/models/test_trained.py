"""Other commands can use the image encoder, the classifier and the adapter that a run has trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rada_fast import cli
from rada_fast.errors import UserError
from rada_fast.models.trained import open_run, read_classifier
from rada_fast.models.vision_language import load_model
from tests.pictures import write_class_folders

WEIGHTS = "rada-ft-model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with pictures, a run of fft on them and a run of eft."""
    root = tmp_path_factory.mktemp("trained")
    write_class_folders(root / "pictures", ("red plain square", "blue plain ring"), each=2)
    data = f"--train imagefolder:{root}/pictures --test imagefolder:{root}/pictures"
    train = "--epochs 1 --finetune-from 1 --finetune-epochs 1 --lr 0.1 --finetune-lr 1e-3"
    assert cli.main(f"fft {data} {train} --output {root}/fft".split()) == 0
    assert cli.main(f"eft {data} --protocol all --epochs 1 --output {root}/eft".split()) == 0
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "fft", tmp_path / "fft"))


def records(path: Path, **fields: str) -> dict[str, Any]:
    lines = map(json.loads, path.read_text().splitlines())
    chosen = [line for line in lines if all(line[name] == value for name, value in fields.items())]
    return {line["id"]: (line["adapted"], line["confidence"][1]) for line in chosen}


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that answers are equal and confidences close: the batches differ, and with them the rounding."""
    assert found.keys() == expected.keys()
    for image, (answer, confidence) in expected.items():
        assert found[image] == (answer, pytest.approx(confidence, abs=1e-5))


def test_encoder_classifier_and_adapter_predict_as_in_their_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "fft"
    command = f"ttt --data imagefolder:{folder}/pictures --views 1 --steps 0 --adapter {run}"
    given = f"--pretrained {run}/{WEIGHTS} --text-features classifier:{run} --output {tmp_path}/a"
    assert cli.main(f"{command} {given}".split()) == 0
    assert "warning" not in capsys.readouterr().err
    found = records(tmp_path / "a" / "images.jsonl")
    assert len(found) == 4
    assert_alike(found, records(run / "images.jsonl", stage="rada-ft"))

    assert cli.main(f"{command} --pretrained {run} --output {tmp_path}/b".split()) == 0
    assert f"--text-features classifier:{run} uses it" in capsys.readouterr().err
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["warnings"]


def test_a_run_with_frozen_encoders_stands_for_the_model_it_started_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "eft"
    assert load_model("embedded", str(run)).fingerprint == load_model("embedded").fingerprint
    command = f"ttt --data imagefolder:{folder}/pictures --views 1 --steps 0 --adapter {run} --pretrained {run}"
    assert cli.main(f"{command} --output {tmp_path}/a".split()) == 0
    assert_alike(records(tmp_path / "a" / "images.jsonl"), records(run / "images.jsonl"))


def test_a_run_that_started_from_another_run_leads_to_its_model(copied: Path, folder: Path) -> None:
    trained = load_model("embedded", str(copied)).fingerprint
    assert trained != load_model("embedded").fingerprint
    later = copied.parent / "later"
    shutil.copytree(folder / "eft", later)
    record = json.loads((later / "run.json").read_text())
    record["identity"]["options"]["model"]["pretrained"] = str(copied)
    record["identity"]["model"] = None
    (later / "run.json").write_text(json.dumps(record))
    assert load_model("embedded", str(later)).fingerprint == trained


def test_weights_that_have_changed_since_the_run_are_warned_of(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((copied / "run.json").read_text())
    record["identity"]["model"] = "0" * 64
    (copied / "run.json").write_text(json.dumps(record))
    load_model("embedded", str(copied))
    assert "that it started from have changed since" in capsys.readouterr().err


def damage(run: Path, case: str) -> None:
    record, tensors = json.loads((run / "run.json").read_text()), load_file(run / WEIGHTS)
    first = next(name for name in tensors if name.startswith("visual."))
    match case:
        case "record":
            (run / "run.json").unlink()
        case "damaged":
            (run / "run.json").write_text("{")
        case "deep":
            (run / "run.json").write_text("[" * 100_000)
        case "kinds":
            record["identity"]["options"]["model"]["model"] = 7
        case "model":
            record["identity"]["options"]["model"]["model"] = "ViT-B-32"
        case "unfinished":
            (run / WEIGHTS).unlink()
        case "shape":
            tensors[first] = torch.zeros(3)
        case "name":
            tensors["visual.other"] = tensors.pop(first)
        case "nan":
            tensors[first] = tensors[first] * float("nan")
    if case in ("kinds", "model"):
        (run / "run.json").write_text(json.dumps(record))
    if case in ("shape", "name", "nan"):
        save_file(tensors, run / WEIGHTS)
    if case == "torn":
        (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("record", "has no run.json beside it"),
        ("damaged", "run.json is damaged"),
        ("deep", "run.json is damaged"),
        ("kinds", "its options are of other kinds"),
        ("model", "was trained from the model ViT-B-32: give --model ViT-B-32"),
        ("unfinished", "has not trained its image encoder yet"),
        ("shape", "does not fit the model embedded"),
        ("name", "does not fit the model embedded"),
        ("nan", "holds NaN or infinity"),
        ("torn", "has not trained its image encoder yet"),
    ],
)
def test_runs_that_cannot_be_used_are_refused(copied: Path, case: str, message: str) -> None:
    damage(copied, case)
    with pytest.raises(UserError, match=message):
        load_model("embedded", str(copied))


def test_files_that_are_no_runs_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"visual.a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert open_run(tmp_path / "weights.safetensors") is None
    assert open_run(folder / "pictures" / "red plain square" / "0.png") is None
    with pytest.raises(UserError, match=r"must be a run of rada-fast, a weights file or a tag; it has no run\.json"):
        load_model("embedded", str(folder / "pictures"))
    with pytest.raises(UserError, match="must be left out for the embedded model"):
        load_model("embedded", "openai")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "it does not exist"),
        ("eft", "the folder holds no trained classifier"),
        ("eft/adapter.safetensors", r"it holds no matrix classifier\.weight"),
        ("eft/run.json", r"it holds no matrix classifier\.weight"),
    ],
)
def test_files_without_a_classifier_are_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_classifier(folder / name)


def test_a_classifier_of_other_classes_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "three", ("a ring", "b ring", "c ring"))
    given = f"--data imagefolder:{tmp_path}/three --text-features classifier:{folder}/fft --output {tmp_path}/o"
    assert cli.main(f"ttt {given}".split()) == 2
    assert "holds a classifier of 2 classes, the data have 3" in capsys.readouterr().err
