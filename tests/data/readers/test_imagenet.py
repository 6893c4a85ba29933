"""ImageNet and its variants are found under every project's names, with the published classes in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from rada_fast.data.open import open_source
from rada_fast.data.readers.imagenet import IMAGENET_KINDS, synsets
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.models.class_names import class_names_of
from rada_fast.system import notices
from tests.miniatures import write_class_tree

TENCH, GOLDFISH, STINGRAY = "n01440764", "n01443537", "n01498041"


def opened(spec: str) -> tuple[ImageFolder, list[str]]:
    """Return the source and the warnings."""
    with notices.collecting():
        source = open_source(spec)
        assert isinstance(source, ImageFolder)
        return source, notices.so_far()


def test_the_lists_of_classes_are_the_published_ones() -> None:
    counts = {kind.kind: len(synsets(kind.synsets)) for kind in IMAGENET_KINDS}
    assert counts == {
        "imagenet": 1000, "imagenet-v2": 1000, "imagenet-sketch": 1000, "imagenet-a": 200, "imagenet-r": 200,
    }  # fmt: skip
    all_of_them = synsets("imagenet")
    for kind in IMAGENET_KINDS:
        wnids = synsets(kind.synsets)
        assert list(wnids) == sorted(wnids)
        assert set(wnids) <= set(all_of_them)
    assert synsets("imagenet_a")[0] == STINGRAY
    assert synsets("imagenet_r")[:2] == (GOLDFISH, "n01484850")
    assert len(set(synsets("imagenet_a")) & set(synsets("imagenet_r"))) == 86


PLACES = {
    "imagenet": ["imagenet/images/val", "ImageNet/val", "ILSVRC2012/val_dirs", "val", "imagenet/val_in_folder"],
    "imagenet-v2": [
        "imagenetv2/imagenetv2-matched-frequency-format-val",
        "imagenetv2-matched-frequency-format-val",
        "",
    ],
    "imagenet-sketch": ["imagenet-sketch/images", "ImageNet-Sketch", "sketch", ""],
    "imagenet-a": ["imagenet-adversarial/imagenet-a", "imagenet-a/imagenet-a", "imagenet-a", ""],
    "imagenet-r": ["imagenet-rendition/imagenet-r", "imagenet-r/imagenet-r", "imagenet-r", ""],
}


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
def test_every_layout_is_found_from_the_root_and_from_inside(tmp_path: Path, kind: str, place: str) -> None:
    (known,) = (one for one in IMAGENET_KINDS if one.kind == kind)
    wnids = synsets(known.synsets)
    labels = (2, 10, len(wnids) - 1)
    names = [str(label) if known.numbered else wnids[label] for label in labels]
    folder = write_class_tree(tmp_path / place, {name: 1 + rank for rank, name in enumerate(names)})
    (folder / "README.txt").touch()
    for path in dict.fromkeys((tmp_path, folder, folder.parent if place else folder)):
        source, _ = opened(f"{kind}:{path}")
        assert source.folders == wnids
        assert sorted(source.labels.tolist()) == [2, 10, 10, *(3 * [len(wnids) - 1])]
        assert source.path == folder


def test_the_folders_of_imagenet_v2_are_numbers_and_not_texts(tmp_path: Path) -> None:
    folder = write_class_tree(tmp_path / "v2", {str(label): 1 for label in range(1000)})
    source, _ = opened(f"imagenet-v2:{folder}")
    assert {sample.id: sample.label for sample in source.samples} == {f"{n}/0.JPEG": n for n in range(1000)}
    names = class_names_of(source, None, prompts=True)
    assert names[:3] == ("tench", "goldfish", "great white shark")
    assert names[10] == "brambling"
    assert names[999] == "toilet paper"
    train = write_class_tree(tmp_path / "train", dict.fromkeys(synsets("imagenet"), 1))
    trained, _ = opened(f"imagenet:{train}")
    assert source.classes_beyond(trained) is source.labels_among(trained) is source.class_difference(trained) is None


def test_the_names_are_open_clips_and_subsets_are_found_among_all(tmp_path: Path) -> None:
    variant, _ = opened(f"imagenet-a:{write_class_tree(tmp_path / 'a', dict.fromkeys(synsets('imagenet_a'), 1))}")
    names = class_names_of(variant, None, prompts=True)
    assert len(names) == 200
    assert names[:2] == ("stingray", "goldfinch")
    whole, _ = opened(f"imagenet:{write_class_tree(tmp_path / 'i', dict.fromkeys(synsets('imagenet'), 1))}")
    labels = variant.labels_among(whole)
    assert labels is not None
    every = class_names_of(whole, None, prompts=True)
    assert [every[label] for (label,) in labels] == list(names)


def test_training_and_validation_images_are_told_apart(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_class_tree(tmp_path / "imagenet" / "images" / part, {TENCH: 3 if part == "train" else 2})
    for spec in (f"imagenet:{tmp_path}", f"imagenet:{tmp_path}/imagenet", f"coop:{tmp_path}/imagenet"):
        assert len(open_source(spec, "train").ids) == 3
        assert len(open_source(spec).ids) == len(open_source(f"{spec}@val").ids) == 2


def test_class_names_beside_the_images_are_coops(tmp_path: Path) -> None:
    write_class_tree(tmp_path / "imagenet" / "images" / "val", {TENCH: 1})
    lines = [f"{wnid} name of {label}" for label, wnid in enumerate(synsets("imagenet"))]
    (tmp_path / "imagenet" / "classnames.txt").write_text("\n".join(lines) + "\n")
    source, _ = opened(f"coop:{tmp_path}/imagenet")
    assert class_names_of(source, None, prompts=True)[:2] == ("name of 0", "name of 1")
    (tmp_path / "imagenet" / "classnames.txt").write_text("\n".join(lines[1:]) + "\n")
    source, warnings = opened(f"coop:{tmp_path}/imagenet")
    assert class_names_of(source, None, prompts=True)[:2] == ("tench", "goldfish")
    assert any("has no name for 1 classes, such as n01440764" in message for message in warnings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("imagenetv2", "imagenet-v2"),
        ("imagenet-adversarial", "imagenet-a"),
        ("imagenet-rendition", "imagenet-r"),
        ("imagenet-sketch", "imagenet-sketch"),
    ],
)
def test_coops_names_of_variants_are_known(tmp_path: Path, name: str, kind: str) -> None:
    place = PLACES[kind][0]
    write_class_tree(tmp_path / place, {"388" if kind == "imagenet-v2" else "n02510455": 1, STINGRAY: 0})
    if kind != "imagenet-a":
        with notices.collecting():
            assert open_source(f"coop:{tmp_path}/{name}") == open_source(f"{kind}:{tmp_path}")
    else:
        with pytest.raises(UserError, match="ImageNet-A: 1 of the 2 class folders"):
            open_source(f"coop:{tmp_path}/{name}")


def test_missing_classes_stay_classes_and_are_named(tmp_path: Path) -> None:
    write_class_tree(tmp_path, {TENCH: 1, GOLDFISH: 1, "notes": 1})
    source, warnings = opened(f"imagenet:{tmp_path}")
    assert source.num_classes == 1000
    assert len(source.samples) == 2
    assert any("998 of its 1000 classes have no folder and stay classes" in message for message in warnings)
    assert ("notes", "no class of ImageNet") in source.skipped


def test_data_of_another_kind_are_named(tmp_path: Path) -> None:
    write_class_tree(tmp_path / "r", dict.fromkeys(synsets("imagenet_r"), 1))
    with pytest.raises(UserError, match=r"class folders in .* are not among its 200 .*did you mean .*imagenet-r:"):
        opened(f"imagenet-a:{tmp_path}/r")
    _, warnings = opened(f"imagenet:{tmp_path}/r")
    assert any("its classes are those of ImageNet-R: did you mean imagenet-r:" in message for message in warnings)
    write_class_tree(tmp_path / "numbers", {"0": 1, "1000": 1})
    with pytest.raises(UserError, match=r"1 of the 2 class folders in .* are not among its 1000 classes: 1000"):
        opened(f"imagenet-v2:{tmp_path}/numbers")
    write_class_tree(tmp_path / "twice", {"1": 1, "01": 1})
    with pytest.raises(UserError, match=r"several class folders in .* are the same class"):
        opened(f"imagenet-v2:{tmp_path}/twice")


def test_what_is_missing_is_described(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ImageNet-A: folder .*/none does not exist; .* is empty"):
        opened(f"imagenet-a:{tmp_path}/none")
    (tmp_path / "imagenet-a.tar").touch()
    with pytest.raises(UserError, match=r"sub-folders are WordNet ids such as n01498041; looked for .*/imagenet-a/.*"
                                        r"holds imagenet-a.tar; extract imagenet-a.tar first"):  # fmt: skip
        opened(f"imagenet-a:{tmp_path}")
    write_class_tree(tmp_path / "deep" / "er", {STINGRAY: 1})
    with pytest.raises(UserError, match=rf"did you mean imagenet-a:{tmp_path}/deep/er\?"):
        opened(f"imagenet-a:{tmp_path}")
    write_class_tree(tmp_path / "flat" / "imagenet", {"val": 3})
    with pytest.raises(UserError, match=r"the pictures in .*/val must be moved into one folder for each class"):
        opened(f"imagenet:{tmp_path}/flat")
    write_class_tree(tmp_path / "flat" / "imagenet" / "train", {STINGRAY: 1})
    with pytest.raises(UserError, match=r"the pictures in .*/val must be moved into one folder for each class"):
        opened(f"imagenet:{tmp_path}/flat")  # and not a suggestion of the training images
    with pytest.raises(UserError, match=rf"did you mean imagenet-a:{tmp_path}/deep/er\?"):
        opened(f"imagenet-a:{tmp_path}/deep/er/{STINGRAY}")
    with pytest.raises(UserError, match=r"sub-folders are the numbers 0 ... 999"):
        opened(f"imagenet-v2:{tmp_path}/flat")
