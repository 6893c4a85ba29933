"""Images and features answer alike what the loops ask of data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rada_fast.data.few_shot import base_and_new
from rada_fast.data.sources import FeatureFile, ImageFolder, Sample, Source
from rada_fast.errors import UserError

LABELS = [0, 0, 1, 1, 1, 2, 2, 2, 2]


def images(folders: tuple[str, ...] = ("cat", "dog", "owl"), **fields: str) -> ImageFolder:
    named = [(f"{folders[label]}/{index}.png", label) for index, label in enumerate(LABELS) if label < len(folders)]
    samples = tuple(Sample(id, Path("data", id), label) for id, label in named)
    return ImageFolder(Path("data"), folders, samples, **fields)


def rows(names: tuple[str, ...] | None = ("cat", "dog", "owl"), views: int | None = None) -> FeatureFile:
    labels = [label for label in LABELS if names is None or label < len(names)]
    shape = (len(labels), 4) if views is None else (len(labels), views, 4)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return FeatureFile(Path("f.npz"), features, torch.tensor(labels), tuple(map(str, range(len(labels)))), names)


BOTH = pytest.mark.parametrize("source", [images(), rows()], ids=["images", "features"])


@BOTH
def test_sources_have_classes_labels_and_ids(source: Source) -> None:
    assert source.class_names == ("cat", "dog", "owl")
    assert source.has_classes
    assert source.num_classes == 3
    assert source.labels.tolist() == LABELS
    assert source.known_labels() == dict(zip(source.ids, LABELS, strict=True))


@BOTH
def test_subsets_are_labelled_anew(source: Source) -> None:
    subset = source.subset([2, 0])
    assert subset.class_names == ("owl", "cat")
    assert subset.labels.tolist() == [1, 1, 0, 0, 0, 0]
    assert subset.ids == (*source.ids[:2], *source.ids[5:])


@BOTH
def test_shots_are_drawn_from_every_class_by_seed(source: Source) -> None:
    assert source.few_shot(2, seed=0).labels.bincount().tolist() == [2, 2, 2]
    assert len({source.few_shot(2, seed).ids for seed in range(8)}) > 1


def test_shots_do_not_depend_on_the_order() -> None:
    reversed_images = ImageFolder(Path("data"), images().folders, images().samples[::-1])
    assert set(reversed_images.few_shot(2, seed=0).ids) == set(images().few_shot(2, seed=0).ids)


def test_a_limit_takes_images_of_every_class_in_turn_and_the_first_features() -> None:
    assert images().limited(4).labels.tolist() == [0, 0, 1, 2]
    assert images().limited(4).folders == images().folders
    assert rows().limited(4).labels.tolist() == [0, 0, 1, 1]
    for source in (images(), rows()):
        assert source.limited(None) is source.limited(9) is source


def test_only_features_have_widths_views_and_a_scale() -> None:
    assert images().holds_images
    assert (images().width, images().num_views, images().views(), images().logit_scale) == (None, None, None, None)
    for source, count in ((rows(), 1), (rows(views=3), 3)):
        assert not source.holds_images
        assert source.samples == ()
        assert (source.width, source.num_views) == (4, count)
        assert source.views().shape == (9, count, 4)
        torch.testing.assert_close(source.views().norm(dim=-1), torch.ones(9, count))


def test_images_without_classes_have_no_labels() -> None:
    source = ImageFolder(Path("data"), (), (Sample("a.png", Path("data/a.png"), -1),))
    assert not source.has_classes
    assert source.known_labels() == {"a.png": None}


def test_folders_that_cannot_name_classes_have_no_names() -> None:
    with pytest.raises(UserError, match="one level too high"):
        _ = images(fault="one level too high").class_names


def test_data_of_other_classes_say_how_they_differ() -> None:
    assert images().class_difference(images()) is None
    assert images().class_difference(rows()) is rows().class_difference(images()) is None
    assert images(("cat", "fox")).class_difference(images()) == "only one of them has the class folders dog, fox, owl"
    train = rows(("cat", "dog", "owl", "fox"))
    assert rows().class_difference(train) is rows(None).class_difference(train) is None
    difference = rows(("cat", "owl", "dog")).class_difference(train)
    assert difference == "the class_names of label 1 are 'owl' and 'dog'"


def test_tested_classes_must_have_been_trained() -> None:
    assert images(("dog", "cat")).classes_beyond(images()) is None
    assert images(("dog", "cat")).labels_among(images()) == [(1,), (0,)]
    assert images().labels_among(images()) is rows().labels_among(rows()) is None
    assert images(("dog", "fox")).classes_beyond(images()) == "train lacks the class folders fox"
    assert rows(("cat", "dog")).classes_beyond(rows()) is None
    assert rows(None).classes_beyond(rows(("cat", "dog"))) == "its labels end at 2, those of train at 1"
    assert "label 0 are 'dog' and 'cat'" in str(rows(("dog", "cat")).classes_beyond(rows()))
    for tested, trained in ((rows(), images()), (images(), rows())):
        assert tested.classes_beyond(trained) == "either both are images or both are features"


def test_stamps_change_with_a_file_a_label_and_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    source = ImageFolder(tmp_path, ("cat",), (Sample("a.png", path, 0),))
    assert source.stamps() == {"a.png": "missing, class 0"}
    path.write_bytes(b"abc")
    assert source.stamps()["a.png"].startswith("3 ")
    relabelled = ImageFolder(tmp_path, ("cat", "dog"), (Sample("a.png", path, 1),))
    assert relabelled.stamps()["a.png"] != source.stamps()["a.png"]
    stamps = rows().stamps()
    assert stamps == rows().stamps()
    assert {name for name, stamp in rows(views=2).stamps().items() if stamp != stamps[name]} == {"features"}


def test_base_classes_are_the_first_half_rounded_up() -> None:
    assert base_and_new(5) == ([0, 1, 2], [3, 4])
    assert base_and_new(1) == ([0], [])
