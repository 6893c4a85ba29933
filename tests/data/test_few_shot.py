"""Few-shot choices of the data sets of CoOp are CoOp's own, whether drawn from a seed or read from its files."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rada_fast.data.few_shot import base_and_new
from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from tests.miniatures import coop_rows, write_class_tree, write_coop, write_pickled_split


def drawn_as_dassl_does(rows: list[list[Any]], shots: int) -> list[str]:
    """Draw from the global random numbers, class by class in the order of the list."""
    by_class = defaultdict(list)
    for path, label, _ in rows:
        by_class[label].append(path)
    return [p for paths in by_class.values() for p in (random.sample(paths, shots) if len(paths) >= shots else paths)]


def opened(spec: str) -> ImageFolder:
    source = open_source(spec)
    assert isinstance(source, ImageFolder)
    return source


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 6, 16])
def test_training_and_validation_images_are_those_of_dassl(tmp_path: Path, shots: int, seed: int) -> None:
    write_coop(tmp_path, "dtd")
    rows = coop_rows()
    random.seed(seed)
    train = drawn_as_dassl_does(rows["train"], shots)
    val = drawn_as_dassl_does(rows["val"], min(shots, 4))
    assert list(opened(f"coop:{tmp_path}/dtd@train").few_shot(shots, seed).ids) == train
    assert list(opened(f"coop:{tmp_path}/dtd@val").few_shot(shots, seed).ids) == val


def test_the_images_of_base_classes_do_not_depend_on_when_the_classes_are_halved(tmp_path: Path) -> None:
    write_coop(tmp_path, "dtd")
    source = opened(f"coop:{tmp_path}/dtd@train")
    base, new = base_and_new(source.num_classes)
    assert (base, new) == ([0, 1, 2], [3, 4])
    for labels in (base, new):
        before, after = source.subset(labels).few_shot(2, 1), source.few_shot(2, 1).subset(labels)
        assert before == after
        assert sorted(before.labels.tolist()) == sorted(2 * list(range(len(labels))))
        assert set(before.ids) <= set(source.few_shot(2, 1).ids)
    assert source.subset(new).class_names == ("owl", "cat")


def test_a_published_choice_is_taken_wherever_the_data_lie(tmp_path: Path) -> None:
    folder = write_coop(tmp_path, "dtd")
    rows = coop_rows()
    chosen = {"train": rows["train"][3::6], "val": rows["val"][2::5]}
    for seed, root in ((1, "/home/someone/data/dtd/images"), (2, str(folder / "images"))):
        path = write_pickled_split(folder / "split_fewshot" / f"shot_1-seed_{seed}.pkl", chosen, root)
        assert path.stat().st_size
        assert list(opened(f"coop:{tmp_path}/dtd@train").few_shot(1, seed).ids) == [row[0] for row in chosen["train"]]
        assert list(opened(f"coop:{tmp_path}/dtd@val").few_shot(1, seed).ids) == [row[0] for row in chosen["val"]]
    assert list(opened(f"coop:{tmp_path}/dtd@train").few_shot(1, 3).ids) != [row[0] for row in chosen["train"]]


def test_a_published_choice_of_other_images_or_labels_is_refused(tmp_path: Path) -> None:
    folder = write_coop(tmp_path, "dtd")
    path = folder / "split_fewshot" / "shot_1-seed_1.pkl"
    for rows, message in (
        ([["../../../etc/passwd", 0, "banded"]], "lists '/x/../../../etc/passwd', which is not among the 30 images"),
        ([["banded/train_000.jpg", 1, "banded"]], "the label 1, the data set 0"),
    ):
        write_pickled_split(path, {"train": rows}, "/x")
        with pytest.raises(UserError, match=message):
            opened(f"coop:{tmp_path}/dtd@train").few_shot(1, 1)
    write_pickled_split(path, {"test": []}, "/x")
    with pytest.raises(UserError, match="must have a part 'train'"):
        opened(f"coop:{tmp_path}/dtd@train").few_shot(1, 1)


def test_imagenets_choice_follows_the_order_in_which_coop_found_its_images(tmp_path: Path) -> None:
    wnids = ("n01440764", "n01443537")
    train = write_class_tree(tmp_path / "imagenet" / "images" / "train", dict.fromkeys(wnids, 5))
    rows = [[f"{wnid}/{index}.JPEG", label, "x"] for label, wnid in enumerate(wnids) for index in range(5)]
    random.seed(1)
    assert list(opened(f"imagenet:{tmp_path}@train").few_shot(2, 1).ids) == drawn_as_dassl_does(rows, 2)
    found = rows[4::-1] + rows[:4:-1]
    write_pickled_split(train.parent.parent / "preprocessed.pkl", {"train": found, "test": []}, "/data/images/train")
    random.seed(1)
    expected = drawn_as_dassl_does(found, 2)
    for spec in (f"imagenet:{tmp_path}", f"coop:{tmp_path}/imagenet"):
        source = open_source(spec, "train")
        assert isinstance(source, ImageFolder)
        assert list(source.few_shot(2, 1).ids) == expected
