"""Inspected data are compared with what is published, and every fault is named with how to mend it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rada_fast import cli
from rada_fast.data import inspection, published
from rada_fast.data.inspection import PartReport, inspect
from rada_fast.data.readers.imagenet import synsets
from rada_fast.models.class_names import class_names_of
from tests.miniatures import coop_rows, write_coop, write_pickled_split
from tests.pictures import write_class_folders, write_picture


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the miniature of DTD have the published numbers."""
    known = tuple(one._replace(classes=5, counts=(30, 25, 10)) for one in published.COOP_SETS)
    monkeypatch.setattr(inspection, "COOP_SETS", known)


def reports(spec: str, *, all_files: bool = False) -> dict[str, PartReport]:
    found = inspect(
        spec,
        all_files=all_files,
        names_of=lambda source: class_names_of(source, None, prompts=True),
        advance=lambda: None,
    )
    return {report.part: report for report in found}


@pytest.mark.usefixtures("small")
def test_a_whole_set_of_coop_has_no_fault(tmp_path: Path) -> None:
    folder = write_coop(tmp_path, "dtd")
    found = reports(f"coop:{tmp_path}/dtd")
    assert [(part, report.images, report.each) for part, report in found.items()] == [
        ("train", 30, (6, 6)),
        ("val", 25, (5, 5)),
        ("test", 10, (2, 2)),
    ]
    assert not any(report.faults or report.warnings for report in found.values())
    assert found["val"].names == ("banded", "big dog", "2 stars", "owl", "cat")
    assert found["val"].where == f"DescribableTextures in {folder}"
    assert reports(f"coop:{tmp_path}/dtd@val") == {"val": found["val"]}


@pytest.mark.usefixtures("small")
def test_faults_of_a_set_of_coop_are_named(tmp_path: Path) -> None:
    folder = write_coop(tmp_path, "dtd")
    (folder / "images" / "owl" / "test_000.jpg").write_bytes(b"damaged")
    (folder / "images" / "owl" / "val_000.jpg").unlink()
    rows = coop_rows()
    rows["test"][0] = rows["train"][0]
    rows["test"].pop()
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(rows))
    write_pickled_split(folder / "split_fewshot" / "shot_1-seed_1.pkl", {"train": rows["train"][::6], "val": []}, "/x")
    (folder / "split_fewshot" / "shot_1-seed_2.pkl").write_bytes(b"x")
    found = reports(f"coop:{tmp_path}/dtd", all_files=True)
    test = " | ".join(found["test"].faults)
    assert "test part has 10 images, this has 9: something is missing" in test
    assert "1 of 9 pictures tried cannot be read (owl/test_000.jpg: test_000.jpg cannot be read: not an image" in test
    assert "1 images are also in train (" in test
    assert "1 of the 25 images of val do not exist" in " | ".join(found["val"].warnings)
    assert "1 of 25 pictures tried cannot be read" in " | ".join(found["val"].faults)
    assert "shot_1-seed_1.pkl lists other images than CoOp's draw with seed 1" in " | ".join(found["train"].warnings)
    assert "shot_1-seed_2.pkl is not a dictionary of lists" in " | ".join(found["train"].faults)


def test_numbers_of_classes_and_images_are_compared(tmp_path: Path) -> None:
    write_picture(tmp_path / "imagenet-v2" / "3" / "0.jpeg", size=2)
    faults = " | ".join(reports(f"imagenet-v2:{tmp_path}")["all"].faults)
    assert "999 of 1000 classes have no image (n01440764, " in faults
    assert "ImageNet-V2 has 10 images of each class, 1 classes differ (n01491361 has 1): copy or extract" in faults
    write_coop(tmp_path, "dtd")
    faults = " | ".join(reports(f"coop:{tmp_path}/dtd@test")["test"].faults)
    assert "has 47 classes, this has 5" in faults


def test_data_without_parts_are_inspected_as_a_whole(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("owl", "cat"), each=2)
    found = reports(f"imagefolder:{tmp_path}")
    assert list(found) == ["all"]
    assert (found["all"].images, found["all"].decoded, found["all"].faults) == (4, 4, [])
    (tmp_path / "a.csv").write_text("path,label\nowl/0.png,owl\ncat/0.png,cat\n")
    assert list(reports(f"csv:{tmp_path}/a.csv")) == ["all"]
    (tmp_path / "b.csv").write_text("path,label,split\nowl/0.png,owl,train\ncat/0.png,cat,val\n")
    found = reports(f"csv:{tmp_path}/b.csv")
    assert [report.images for report in found.values()] == [1, 1, 1]
    (tmp_path / "c.csv").write_text("path,label,split\nowl/0.png,owl,train\ncat/0.png,cat,test\n")
    found = reports(f"csv:{tmp_path}/c.csv")
    assert (found["val"].faults, found["val"].warnings) == ([], ["there is no val part"])


def test_names_that_prompts_cannot_use_are_a_fault(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("1", "2"))
    faults = reports(f"imagefolder:{tmp_path}")["all"].faults
    assert len(faults) == 1
    assert "--classes must be given" in faults[0]


def test_a_place_without_the_data_is_one_fault(tmp_path: Path) -> None:
    for spec, message in (
        (f"imagenet:{tmp_path}", "ImageNet: no folder was found"),
        (f"coop:{tmp_path}/dtd", "DescribableTextures: no folder of it was found"),
        ("nonsense", "data must be KIND:PATH"),
    ):
        (report,) = reports(spec).values()
        assert len(report.faults) == 1
        assert report.faults[0].startswith(message)


def test_the_command_prints_faults_and_ends_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_class_folders(tmp_path / "good", ("owl", "cat"))
    write_class_folders(tmp_path / "bad", ("owl", "cat"))
    (tmp_path / "bad" / "owl" / "0.png").write_bytes(b"")
    assert cli.main(["doctor", "--data", f"imagefolder:{tmp_path}/good"]) == 0
    out = capsys.readouterr().out
    assert "all    2 images, 2 classes, 1 of each class" in out
    assert "nothing is wrong" in out
    arguments = ["doctor", "--data", f"imagefolder:{tmp_path}/good", f"imagefolder:{tmp_path}/bad"]
    assert cli.main(arguments) == 1
    assert "WRONG: 1 of 2 pictures tried cannot be read (owl/0.png: 0.png cannot be read" in capsys.readouterr().out
    assert cli.main([*arguments, "--json", "--all-files"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [len(report["faults"]) for reports in found.values() for report in reports] == [0, 1]


def test_the_published_numbers_are_those_of_the_lists() -> None:
    assert {one.name: (one.classes, sum(one.counts)) for one in published.COOP_SETS} == {
        "Caltech101": (100, 8242), "OxfordPets": (37, 7349), "StanfordCars": (196, 16185), "OxfordFlowers": (102, 8189),
        "Food101": (101, 101000), "FGVCAircraft": (100, 10000), "SUN397": (397, 39700),
        "DescribableTextures": (47, 5640), "EuroSAT": (10, 27000), "UCF101": (101, 13320),
    }  # fmt: skip
    assert len(synsets("imagenet")) == 1000
