"""ObjectNet's images of ImageNet's classes are read without their frames, as the classes that its own lists name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rada_fast.data.decode import read_image
from rada_fast.data.open import open_source
from rada_fast.data.readers.imagenet import synsets
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.models.class_names import class_names_of
from tests.miniatures import write_class_tree

FOLDERS = {"alarm_clock": "Alarm clock", "chair": "Chair", "air_freshener": "Air freshener"}
EQUAL = {"Alarm clock": "analog clock; digital clock", "Chair": "rocking chair, rocker"}
# The lines of the list have numbers of 2012, and ImageNet's labels come from the second list.
LINES = ("kit fox", "digital clock", "rocking chair, rocker", "analog clock")
NUMBERS = {"409": 3, "530": 1, "765": 2, "278": 0}


def write_objectnet(root: Path) -> Path:
    """Write the data set with two classes of ImageNet's and one other."""
    lists = root / "mappings"
    lists.mkdir(parents=True)
    for name, value in (
        ("folder_to_objectnet_label.json", FOLDERS),
        ("objectnet_to_imagenet_1k.json", EQUAL),
        ("pytorch_to_imagenet_2012_id.json", NUMBERS),
    ):
        (lists / name).write_text(json.dumps(value))
    (lists / "imagenet_to_label_2012_v2").write_text("\n".join(LINES) + "\n")
    for folder in FOLDERS:
        (root / "images" / folder).mkdir(parents=True)
        framed = Image.new("RGB", (12, 10), (255, 0, 0))
        framed.paste((0, 0, 255), (2, 2, 10, 8))
        framed.save(root / "images" / folder / "a.png")
    return root


def opened(spec: str) -> ImageFolder:
    source = open_source(spec)
    assert isinstance(source, ImageFolder)
    return source


def test_the_classes_are_those_of_its_lists(tmp_path: Path) -> None:
    root = write_objectnet(tmp_path / "objectnet-1.0")
    for path in (tmp_path, root, root / "images"):
        source = opened(f"objectnet:{path}")
        assert source.folders == ("alarm_clock", "chair")
        assert class_names_of(source, None, prompts=True) == ("alarm clock", "chair")
        assert [(sample.id, sample.label) for sample in source.samples] == [
            ("alarm_clock/a.png", 0),
            ("chair/a.png", 1),
        ]


def test_a_class_can_be_several_of_imagenets(tmp_path: Path) -> None:
    source = opened(f"objectnet:{write_objectnet(tmp_path / 'o')}")
    train = opened(f"imagenet:{write_class_tree(tmp_path / 'i', {synsets('imagenet')[0]: 1})}")
    assert source.classes_beyond(train) is None
    assert source.labels_among(train) == [(409, 530), (765,)]
    assert source.subset([1]).labels_among(train) == [(765,)]
    few = opened(f"imagefolder:{write_class_tree(tmp_path / 'few', {synsets('imagenet')[530]: 1})}")
    assert source.labels_among(few) == [(0,), ()]
    assert source.classes_beyond(few) == "train lacks the class folders chair"


def test_the_red_frame_is_cut_off(tmp_path: Path) -> None:
    sample = opened(f"objectnet:{write_objectnet(tmp_path)}").samples[0]
    image = read_image(sample.path)
    assert image.size == (8, 6)
    assert image.getcolors() == [(48, (0, 0, 255))]


def test_what_is_missing_is_described(tmp_path: Path) -> None:
    root = write_objectnet(tmp_path / "objectnet-1.0")
    (root / "mappings" / "imagenet_to_label_2012_v2").rename(tmp_path / "list")
    with pytest.raises(UserError, match=r"mappings lacks imagenet_to_label_2012_v2, which objectnet-1\.0\.zip holds"):
        opened(f"objectnet:{tmp_path}")
    (tmp_path / "list").rename(root / "mappings" / "imagenet_to_label_2012_v2")
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Chair": "stool"}))
    with pytest.raises(UserError, match="does not list 'stool'"):
        opened(f"objectnet:{tmp_path}")
    (root / "images").rename(root / "pictures")
    with pytest.raises(UserError, match="no folder was found whose sub-folders are classes such as chair"):
        opened(f"objectnet:{tmp_path}")
    (root / "mappings").rename(root / "maps")
    with pytest.raises(UserError, match=r"lists that say .* were not found; .*put folder_to_objectnet_label\.json"):
        opened(f"objectnet:{tmp_path}")
