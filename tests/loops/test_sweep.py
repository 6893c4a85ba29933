"""Runs of eft over sets and seeds are those of single commands, and give one table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rada_fast import cli
from rada_fast.config.commands import EFTOptions
from rada_fast.config.options import AdapterOptions, ClassOptions, RunOptions
from rada_fast.errors import UserError
from rada_fast.loops import sweep
from rada_fast.loops.eft import run_eft
from rada_fast.loops.sweep import ALL_SETS, run_eft_runs, sets_of

from .support import features_file, lines, text_file


@pytest.fixture
def options(tmp_path: Path) -> EFTOptions:
    """Return options of two sets of features and two seeds."""
    for name, noise in (("dtd", 1.0), ("eurosat", 3.0)):
        features_file(tmp_path / f"{name}.npz", classes=4, each=6, noise=noise)
    place = f"features:{tmp_path}/{{set}}.npz"
    text = ClassOptions(text_features=text_file(tmp_path / "text.npz", classes=4))
    run = RunOptions(output=str(tmp_path / "runs"))
    return EFTOptions(
        place, place, sets=("dtd", "eurosat"), seeds=(1, 2), epochs=1, batch_size=4, shots=2, text=text,
        adapter=AdapterOptions(num_heads=2), run=run,
    )  # fmt: skip


def test_sets_and_seeds_give_the_row_of_a_table(options: EFTOptions, tmp_path: Path) -> None:
    summary = run_eft_runs(options)
    assert summary["runs"] == 4
    found = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    first, second, average = found["base_to_new"]
    assert [row["seeds"] for row in (first, second, average)] == ["1 2"] * 3
    assert average["data"] == "average of 2 sets"
    assert summary["average of 2 sets"]["base"] == round((first["adapted_base"] + second["adapted_base"]) / 2, 3)
    # A run of a single command is the same run.
    data = options.train.replace("{set}", "dtd")
    single = dataclasses.replace(options, train=data, test=data, sets=(), seeds=())
    folder = str(tmp_path / "runs" / "dtd" / "seed-2")
    assert run_eft(dataclasses.replace(single, run=RunOptions(output=folder, seed=2)))["resumed"] == 1
    own = json.loads((Path(folder) / "summary.json").read_text())
    assert own["base"]["adapted_top1"] in [row["adapted_top1"] for row in found["runs"]]


def test_finished_runs_are_skipped_and_others_go_on(
    options: EFTOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_eft_runs(options)
    shutil.rmtree(tmp_path / "runs" / "eurosat" / "seed-1")
    done: list[Any] = []

    def counted(one: EFTOptions) -> dict[str, Any]:
        done.append(run_eft(one)["resumed"])
        return json.loads((Path(one.run.output) / "summary.json").read_text())

    monkeypatch.setattr(sweep, "run_eft", counted)
    run_eft_runs(options)
    assert done == [1, 1, 0, 1]


def test_a_run_that_cannot_be_done_is_named_and_the_others_are_done(options: EFTOptions, tmp_path: Path) -> None:
    (tmp_path / "dtd.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"2 of 4 runs could not be done \(dtd, seed 1, dtd, seed 2\);.* not a"):
        run_eft_runs(options)
    assert (tmp_path / "runs" / "eurosat" / "seed-2" / "summary.json").is_file()
    (tmp_path / "dtd.npz").unlink()
    with pytest.raises(UserError, match=r"sets must lie in --root, these do not: .*dtd.npz"):
        run_eft_runs(options)


@pytest.mark.usefixtures("tiny")
def test_sets_of_coop_are_found_below_the_root(specks: Path, tmp_path: Path) -> None:
    for folder, split in (("DTD", "DescribableTextures"), ("eurosat", "EuroSAT")):
        root = tmp_path / "data" / folder
        shutil.copytree(specks, root / ("images" if folder == "DTD" else "2750"))
        images = [[f"{name}/{index}.png", label, name] for label, name in enumerate(("cat", "dog")) for index in (0, 1)]
        content = {"train": images, "val": images, "test": images}
        (root / f"split_zhou_{split}.json").write_text(json.dumps(content))
    options = EFTOptions(
        sets=("dtd", "eurosat"), root=str(tmp_path / "data"), epochs=1, run=RunOptions(output=str(tmp_path / "runs")),
        text=ClassOptions(templates=("coop",)),
    )  # fmt: skip
    summary = run_eft_runs(options)
    assert summary["runs"] == 2
    assert summary["average of 2 sets"].keys() >= {"base", "new", "mean_of_harmonic_means", "harmonic_mean_of_means"}
    assert sets_of(dataclasses.replace(options, sets=("all",))) == ALL_SETS
    assert len(ALL_SETS) == 11
    with pytest.raises(UserError, match=r"these do not: .*imagenet, .*caltech101"):
        run_eft_runs(dataclasses.replace(options, sets=("all",)))
    with pytest.raises(UserError, match=r"sets must be all or some of imagenet, .* got 'photos'"):
        run_eft_runs(dataclasses.replace(options, sets=("photos",)))


@pytest.mark.usefixtures("tiny")
def test_other_data_are_evaluated_with_their_own_classes(specks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(specks / "cat", other / "owl")
    shutil.copytree(specks / "dog", other / "fox")
    shutil.copytree(specks / "dog", other / "zebra")
    spec, data = f"imagefolder:{other}", f"imagefolder:{specks}"
    run = RunOptions(output=str(tmp_path / "run"))
    summary = run_eft(EFTOptions(data, data, protocol="all", epochs=1, evaluate_on=(spec,), run=run))
    assert (summary[spec]["classes"], summary[spec]["images"]) == (3, 6)
    named = {line["label_name"] for line in lines(tmp_path / "run") if line["split"] == spec}
    assert named == {"owl", "fox", "zebra"}
    with pytest.raises(UserError, match="evaluate_on needs prompts"):
        EFTOptions(data, data, evaluate_on=(spec,), text=ClassOptions(text_features="class-means"))


def test_data_or_sets_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eft", "--train", "imagefolder:a"]) == 2
    assert "--train and --test must be given; 'rada-fast eft --help' shows" in capsys.readouterr().err
    assert cli.main(["eft", "--seeds", "1", "1"]) == 2
    assert "--seeds must name everything once" in capsys.readouterr().err
