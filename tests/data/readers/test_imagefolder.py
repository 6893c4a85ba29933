"""Folders of pictures are read with their classes and labels, or refused in one clear line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name, count in (("b_dog", 3), ("a_cat", 2), ("c_owl", 4)):
        (root / name / "deep").mkdir(parents=True)
        for index in range(count):
            place = root / name / ("deep" if index else ".") / f"{index}.{'PNG' if index else 'jpg'}"
            Image.new("RGB", (8, 6), (index, 2, 3)).save(place)
        (root / name / "notes.txt").write_text("not a picture")
        (root / name / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    return root


def test_an_image_folder_is_sorted_and_labelled_by_folder(folder: Path) -> None:
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ("a_cat", "b_dog", "c_owl")
    assert [sample.id for sample in source.samples][:3] == ["a_cat/0.jpg", "a_cat/deep/1.PNG", "b_dog/0.jpg"]
    assert [sample.label for sample in source.samples] == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_pictures_without_classes_have_no_labels(folder: Path) -> None:
    source = open_source(f"images:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ()
    assert {sample.label for sample in source.samples} == {-1}
    assert len(source.samples) == 9


def test_unusable_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "b").mkdir()
    (tmp_path / "texts" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    cases = {
        f"imagefolder:{tmp_path / 'none'}": "does not exist",
        f"imagefolder:{tmp_path / 'empty'}": "must have one sub-folder for each class, it has none",
        f"imagefolder:{tmp_path / 'flat'}": "for pictures without classes give images:",
        f"imagefolder:{tmp_path / 'classes'}": "has 1 sub-folder but no image$",
        f"imagefolder:{tmp_path / 'texts'}": r"has 2 sub-folders but no image \(found a/notes.txt, not a picture\)$",
        f"imagefolder:{folder / 'a_cat' / 'notes.txt'}": "is a file, not a folder",
        f"images:{tmp_path / 'empty'}": "holds no image",
    }
    for spec, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)


def test_empty_class_folders_stay_classes(folder: Path) -> None:
    (folder / "b_bat").mkdir()
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ("a_cat", "b_bat", "b_dog", "c_owl")
    assert source.empty_folders == ("b_bat",)
    assert source.subset([1, 3]).empty_folders == ("b_bat",)
    assert source.subset([3, 0]).empty_folders == ()


def test_links_are_followed_but_never_in_circles(folder: Path) -> None:
    (folder / "b_dog" / "more").symlink_to(folder / "a_cat")
    (folder / "b_dog" / "self").symlink_to(folder / "b_dog")
    (folder / "b_dog" / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "d_cat").symlink_to(folder / "a_cat")
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    by_folder = {name: [s.id for s in source.samples if s.label == i] for i, name in enumerate(source.folders)}
    assert by_folder["d_cat"] == ["d_cat/0.jpg", "d_cat/deep/1.PNG"]
    assert by_folder["b_dog"] == [
        "b_dog/0.jpg",
        "b_dog/deep/1.PNG",
        "b_dog/deep/2.PNG",
        "b_dog/more/0.jpg",
        "b_dog/more/deep/1.PNG",
    ]


def test_classes_at_several_levels(tmp_path: Path) -> None:
    for path in ("a/abbey", "a/apartment_building/outdoor", "o/oil_refinery/outdoor", "a/airport"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "airport" / "1.png")
    (tmp_path / "b" / "empty").mkdir(parents=True)
    source = open_source(f"nested:{tmp_path}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ("a/abbey", "a/airport", "a/apartment_building/outdoor", "o/oil_refinery/outdoor")
    assert source.names == ("abbey", "airport", "outdoor apartment building", "outdoor oil refinery")
    assert source.labels.tolist() == [0, 1, 1, 2, 3]
    for path in ("a/apartment_building", "o"):
        shutil.rmtree(tmp_path / path)
    source = open_source(f"nested:{tmp_path}")
    assert isinstance(source, ImageFolder)
    assert (source.folders, source.names) == (("abbey", "airport"), None)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(UserError, match="must have pictures in sub-folders, it has none; for pictures without classes"):
        open_source(f"nested:{tmp_path / 'flat'}")
    (tmp_path / "parts").mkdir()
    for part in ("train", "Test"):
        shutil.copytree(tmp_path / "a", tmp_path / "parts" / part)
    with pytest.raises(UserError, match=r"Test, train look like parts .* give one of them: nested:.*/Test or nested:"):
        open_source(f"nested:{tmp_path / 'parts'}")
