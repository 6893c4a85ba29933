"""The data sets of CoOp are found under every project's names, with their published parts; wrong ones are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rada_fast.data.open import open_source
from rada_fast.data.published import COOP_SETS, coop_set
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.models.class_names import class_names_of
from rada_fast.system import notices
from tests.miniatures import CLASSES, PARTS, coop_rows, write_coop
from tests.pictures import write_picture


def opened(spec: str) -> tuple[ImageFolder, list[str]]:
    """Return the source and the warnings."""
    with notices.collecting():
        source = open_source(spec)
        assert isinstance(source, ImageFolder)
        return source, notices.so_far()


@pytest.mark.parametrize("name", [known.folders[0] for known in COOP_SETS])
def test_every_set_is_read_as_coop_lays_it_out(tmp_path: Path, name: str) -> None:
    write_coop(tmp_path, name)
    for part, count in PARTS.items():
        source, warnings = opened(f"coop:{tmp_path}/{name}@{part}")
        assert not warnings
        assert len(source.samples) == count * source.num_classes
        assert all(sample.path.is_file() for sample in source.samples)
        assert len(set(source.ids)) == len(source.ids)
    assert opened(f"coop:{tmp_path}/{name}")[0] == opened(f"coop:{tmp_path}/{name}@test")[0]
    assert open_source(f"coop:{tmp_path}/{name}", "train") == opened(f"coop:{tmp_path}/{name}@train")[0]


@pytest.mark.parametrize(
    ("name", "folder", "images"),
    [
        ("dtd", "DTD", "images"),
        ("pets", "OxfordPets", ""),
        ("flowers102", "Flower102", "jpg"),
        ("ucf101", "UCF101", ""),
        ("sun397", "SUN397", ""),
        ("cars", "StanfordCars", ""),
        ("caltech101", "Caltech101", ""),
        ("caltech101", "caltech-101", "101_ObjectCategories"),
        ("eurosat", "eurosat", ""),
    ],
)
def test_a_set_is_found_by_any_name_in_the_layouts_of_coop_and_tpt(
    tmp_path: Path, name: str, folder: str, images: str
) -> None:
    path = write_coop(tmp_path, name, folder, images)
    known = coop_set(name)
    assert known is not None
    sources = [opened(f"coop:{tmp_path}/{called}")[0] for called in (folder, name, known.name, folder.lower())]
    assert all(source == sources[0] for source in sources)
    (tmp_path / "data_splits").mkdir()
    (path / known.split_file).rename(tmp_path / "data_splits" / known.split_file)
    assert opened(f"coop:{tmp_path}/{name}")[0].ids == sources[0].ids


def test_a_folder_of_any_name_is_known_by_its_split_file(tmp_path: Path) -> None:
    write_coop(tmp_path, "dtd", "my textures")
    assert len(opened(f"coop:{tmp_path}/my textures")[0].samples) == 10
    write_coop(tmp_path, "aircraft", "planes")
    assert opened(f"coop:{tmp_path}/planes")[0].class_names == ("707-320", "A300B4", "DC-10 30")


def test_names_are_coops_and_labels_are_those_of_the_split(tmp_path: Path) -> None:
    write_coop(tmp_path, "dtd")
    source, _ = opened(f"coop:{tmp_path}/dtd@val")
    assert source.folders == CLASSES
    names = class_names_of(source, None, prompts=True)
    assert names == ("banded", "big dog", "2 stars", "owl", "cat")
    assert class_names_of(source.subset([3, 1]), None, prompts=True) == ("owl", "big dog")
    rows = coop_rows()["val"]
    assert [(sample.id, sample.label) for sample in source.samples] == [(row[0], row[1]) for row in rows]
    assert source.description == f"DescribableTextures in {tmp_path}/dtd"


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = write_coop(tmp_path, "dtd") / "split_zhou_DescribableTextures.json"
    write_picture(tmp_path / "outside" / "a.jpg")
    (tmp_path / "dtd" / "images" / "link.jpg").symlink_to(tmp_path / "outside" / "a.jpg")
    (tmp_path / "dtd" / "images" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "dtd" / "images" / "inner.jpg").symlink_to(tmp_path / "dtd" / "images" / "banded" / "test_000.jpg")
    for image, refused in (
        ("../../outside/a.jpg", "leads out of the folder"),
        ("banded/../../../outside/a.jpg", "leads out of the folder"),
        (f"{tmp_path}/outside/a.jpg", "leads out of the folder"),
        ("..\\..\\outside\\a.jpg", "leads out of the folder"),
        ("C:\\pictures\\a.jpg", "leads out of the folder"),
        ("\\\\server\\pictures\\a.jpg", "leads out of the folder"),
        ("", "leads out of the folder"),
        ("link.jpg", "is a link that leads out of"),
        ("folder/a.jpg", "is a link that leads out of"),
        ("inner.jpg", None),
    ):
        rows = coop_rows()
        rows["val"].append([image, 0, "banded"])
        path.write_text(json.dumps(rows))
        if refused is None:
            assert len(opened(f"coop:{tmp_path}/dtd@val")[0].samples) == 26
            continue
        for part in PARTS:
            with pytest.raises(UserError, match=refused):
                opened(f"coop:{tmp_path}/dtd@{part}")


def test_a_set_and_its_image_folder_may_be_links(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name, inner in (("dtd", "images"), ("cars", "banded")):
        path = write_coop(elsewhere, name)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).symlink_to(path)
        shutil.move(path / inner, tmp_path / f"moved {name}")
        (path / inner).symlink_to(tmp_path / f"moved {name}")
        assert len(opened(f"coop:{tmp_path}/data/{name}")[0].samples) == 10


def test_an_unusable_split_is_refused(tmp_path: Path) -> None:
    path = write_coop(tmp_path, "dtd") / "split_zhou_DescribableTextures.json"
    whole = coop_rows()
    for value, message in (
        ("{", "is not JSON"),
        ("[]", "must be an object with the lists train, val and test"),
        ({"train": [], "val": []}, "must be an object with the lists"),
        ({part: [] for part in PARTS}, "lists no image"),
        (whole | {"val": [["a.jpg", 0]]}, r"entry 0 of val must be \[path, label, class name\]"),
        (whole | {"val": [["a.jpg", "0", "banded"]]}, "entry 0 of val must be"),
        (whole | {"val": [["a.jpg", -1, "banded"]]}, "the label -1, which must lie in 0"),
        (whole | {"val": [["a.jpg", 10**9, "banded"]]}, "which must lie in 0"),
        (whole | {"val": [["a.jpg", 0, "striped"]]}, "calls the label 0 'banded' and, in val, 'striped'"),
        (whole | {"val": [["a.jpg", 7, "dotted"]]}, "must number its 6 classes 0 ... 5, the largest label is 7 and 5"),
    ):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(UserError, match=message):
            opened(f"coop:{tmp_path}/dtd")


def test_splits_of_windows_and_splits_without_validation_images_are_read(tmp_path: Path) -> None:
    folder = write_coop(tmp_path, "dtd")
    published = opened(f"coop:{folder}")[0]
    rows = coop_rows()
    del rows["val"]
    (folder / "split_zhou_DescribableTextures.json").unlink()
    split = folder / "Split_Zhou_DescribableTextures.JSON"
    windows = {
        part: [[".\\" + path.replace("/", "\\"), label, name] for path, label, name in listed]
        for part, listed in rows.items()
    }
    split.write_text(json.dumps(windows), encoding="utf-8-sig")
    assert opened(f"coop:{folder}")[0] == published
    assert len(open_source(f"coop:{folder}", "train").few_shot(2, 1).ids) == 2 * published.num_classes
    with pytest.raises(UserError, match=r"split file .* has no picture of val"):
        opened(f"coop:{folder}@val")
    with pytest.raises(UserError, match=rf"did you mean coop:{folder}\?"):
        opened(f"coop:{folder}/images")


def test_a_set_that_is_not_there_is_described(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DescribableTextures: no folder of it was found; looked for .*/dtd, .*/DTD; "):
        opened(f"coop:{tmp_path}/dtd")
    with pytest.raises(UserError, match=r"must name one of CoOp's sets \(caltech-101, .*, imagenet\), got 'flours'"):
        opened(f"coop:{tmp_path}/flours")
    path = write_coop(tmp_path, "dtd")
    with pytest.raises(UserError, match=rf"did you mean coop:{path}\?"):
        opened(f"coop:{tmp_path}")
    shutil.move(path / "images", path / "pictures")
    with pytest.raises(UserError, match=r"none of the first listed images, such as 'big_dog/.*pictures/, split_zhou"):
        opened(f"coop:{tmp_path}/dtd")
    shutil.move(path / "pictures", path / "images")
    (path / "split_zhou_DescribableTextures.json").unlink()
    with pytest.raises(UserError, match=r"its split file was not found.*put split_zhou_DescribableTextures.json into"):
        opened(f"coop:{tmp_path}/dtd")
    (tmp_path / "fgvc_aircraft" / "data").mkdir(parents=True)
    (tmp_path / "fgvc_aircraft" / "data" / "variants.txt").touch()
    with pytest.raises(UserError, match=rf"did you mean coop:{tmp_path}/fgvc_aircraft/data\?"):
        opened(f"coop:{tmp_path}/fgvc_aircraft")
    (tmp_path / "food-101").mkdir()
    (tmp_path / "food-101" / "split_zhou_Food101.json").write_text(json.dumps(coop_rows()))
    (tmp_path / "food-101" / "food-101.tar.gz").touch()
    with pytest.raises(UserError, match=r"extract food-101\.tar\.gz first"):
        opened(f"coop:{tmp_path}/food-101")


def test_missing_images_are_counted_and_repeated_ones_kept_apart(tmp_path: Path) -> None:
    path = write_coop(tmp_path, "dtd")
    (path / "images" / "owl" / "test_001.jpg").unlink()
    source, warnings = opened(f"coop:{tmp_path}/dtd")
    assert len(source.samples) == 10
    assert len(warnings) == 1
    assert "1 of the 10 images of test do not exist" in warnings[0]
    assert "owl/test_001.jpg" in warnings[0]
    for image in path.glob("images/*/test*"):
        image.unlink()
    with pytest.raises(UserError, match="none of the 10 images of test exists"):
        opened(f"coop:{tmp_path}/dtd")
    rows = coop_rows()
    rows["val"] += rows["val"][:1]
    (path / "split_zhou_DescribableTextures.json").write_text(json.dumps(rows))
    assert opened(f"coop:{tmp_path}/dtd@val")[0].ids[-1] == "big_dog/val_000.jpg#2"
