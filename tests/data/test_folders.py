"""Class folders are ordered, entries that are no pictures are named, and a folder one level too high is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rada_fast.data.folders import label_order
from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.system import notices
from tests.pictures import write_picture


def draw(*paths: Path) -> None:
    for path in paths:
        write_picture(path, size=2)


def opened(root: Path, kind: str = "imagefolder") -> tuple[ImageFolder, list[str]]:
    """Return the source and the warnings."""
    with notices.collecting():
        source = open_source(f"{kind}:{root}")
        assert isinstance(source, ImageFolder)
        return source, notices.so_far()


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / str(number) / "a.png")
    source, warnings = opened(tmp_path)
    assert source.folders == tuple(str(number) for number in range(12))
    assert {sample.id.split("/")[0]: sample.label for sample in source.samples} == {str(n): n for n in range(12)}
    assert [sample.id for sample in source.samples] == sorted(sample.id for sample in source.samples)
    assert warnings == []


def test_folders_with_the_same_number_are_warned_of(tmp_path: Path) -> None:
    for name in ("2", "1", "01"):
        draw(tmp_path / name / "a.png")
    (warnings,) = opened(tmp_path)[1]
    assert "class folders 01 and 1 are the same number; they are classes 0 and 1" in warnings


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["010", "009", "002"], ("002", "009", "010")),
        # Two folders have the same number: their order is arbitrary, but always the same.
        (["1", "10", "01"], ("01", "1", "10")),
        (["-1", "-2", "+10", "9"], ("-2", "-1", "9", "+10")),
        (["-", "9", "10"], ("-", "10", "9")),
        # With one name that is no number the order is that of texts, as in published lists.
        (["10", "9", "cat"], ("10", "9", "cat")),
        (["c10", "c9"], ("c10", "c9")),
        (["n01440764", "n00005787"], ("n00005787", "n01440764")),
        # Names in digits of other scripts are ordered as texts.
        (["\N{SUPERSCRIPT TWO}", "10"], ("10", "\N{SUPERSCRIPT TWO}")),
        (["1" * 255, "9"], ("9", "1" * 255)),
    ],
)
def test_labels_follow_the_order_of_numbers_or_texts(names: list[str], order: tuple[str, ...]) -> None:
    assert label_order(names) == label_order(names[::-1]) == order


def test_everything_in_a_class_folder_is_used_or_named(tmp_path: Path) -> None:
    cat = tmp_path / "cat"
    draw(cat / "a.png", cat / "b.jfif", cat / "c", cat / "d.jpg" / "e.png", tmp_path / "dog" / "a.png")
    (cat / "torn.png").write_bytes(b"torn")
    (cat / "empty.jpg").touch()
    skipped = {
        "__MACOSX": "left by a system",
        ".git": "hidden",
        "a.csv": "in no class folder",
        "cat/.DS_Store": "hidden",
        "cat/README": "not a picture",
        "cat/Thumbs.db": "not a picture",
        "cat/__MACOSX": "left by a system",
        "cat/gone.png": "a link to nothing",
        "cat/nothing.jpg": "an empty folder",
        "cat/pipe.jpg": "a FIFO",
        "cat/round.png": "a link round in a circle",
        "cat/up": "a link back to a folder that holds it",
        "cat/zero.jpg": "a device",
        "loop": "a link back to a folder that holds it",
    }
    for folder in (".git", "__MACOSX/cat", "cat/__MACOSX", "cat/nothing.jpg"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.csv", "cat/.DS_Store", "cat/README", "cat/Thumbs.db", "cat/__MACOSX/._a.png"):
        (tmp_path / file).write_text("x")
    os.mkfifo(cat / "pipe.jpg")
    for link, target in {"gone.png": "no.png", "round.png": "round.png", "up": "..", "zero.jpg": "/dev/zero"}.items():
        (cat / link).symlink_to(target)
    (tmp_path / "loop").symlink_to(".")

    source, warnings = opened(tmp_path)
    assert [sample.id for sample in source.samples if sample.label == 0] == [
        "cat/a.png",
        "cat/b.jfif",
        "cat/c",
        "cat/d.jpg/e.png",
        "cat/empty.jpg",
        "cat/torn.png",
    ]
    assert dict(source.skipped) == skipped
    assert source.folders == ("cat", "dog")
    (line,) = warnings
    assert line.startswith(f"data {tmp_path}: 14 entries were skipped: ")
    assert line.endswith(" and 9 more")


def test_skipped_files_are_reported_once_with_an_example_of_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "cat" / "a.png", tmp_path / "dog" / "a.png")
    for index in range(9):
        (tmp_path / "cat" / f"{index}.txt").write_text("x")
    os.mkfifo(tmp_path / "dog" / "pipe")
    with notices.collecting():
        open_source(f"imagefolder:{tmp_path}")
        open_source(f"imagefolder:{tmp_path}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"rada-fast: warning: data {tmp_path}: 10 entries were skipped: cat/0.txt (not a picture), dog/pipe (a FIFO), "
        "cat/1.txt (not a picture), cat/2.txt (not a picture), cat/3.txt (not a picture) and 5 more"
    )
    assert opened(tmp_path, "images")[1] == [line.removeprefix("rada-fast: warning: ")]


def test_empty_class_folders_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "a.png", tmp_path / "dog" / "a.png")
    for index in range(7):
        (tmp_path / f"empty{index}").mkdir()
    assert opened(tmp_path)[1] == [
        f"data {tmp_path}: 7 class folders hold no picture and stay classes: "
        "empty0, empty1, empty2, empty3, empty4, ... empty6"
    ]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (["inner/cat/a", "inner/dog/a"], "in 2 sub-folders (cat, dog) of one; did you mean imagefolder:{0}/inner?"),
        (["a/b/c/cat/x", "a/b/c/dog/deep/x"], "sub-folders (cat, dog) of one; did you mean imagefolder:{0}/a/b/c?"),
        (["train/cat/a", "Val/cat/a"], "give one of them: imagefolder:{0}/Val or imagefolder:{0}/train"),
        (
            ["train/a", "test/a"],
            "sub-folders test, train look like parts of a data set; put each class's pictures into",
        ),
    ],
)
def test_a_folder_one_level_too_high_names_the_one_to_give(tmp_path: Path, pictures: list[str], message: str) -> None:
    draw(*(tmp_path / name for name in pictures))
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert message.format(tmp_path) in str(caught.value)


def test_a_class_folder_itself_names_the_one_above(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "a.png", tmp_path / "dog" / "a.png")
    with pytest.raises(UserError, match=rf"give images:{tmp_path}/cat, for the folders .* imagefolder:{tmp_path}$"):
        opened(tmp_path / "cat")


def test_folders_beside_the_one_with_all_pictures_do_not_hide_it(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "cat" / "a.png", tmp_path / "images" / "dog" / "a.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    source, warnings = opened(tmp_path)
    # Given as test images, the folder is refused for other classes; given as data, for the pictures one level deeper.
    assert source.fault is not None
    assert source.fault.endswith(f"did you mean imagefolder:{tmp_path}/images?")
    assert len(warnings) == 2


def test_classes_that_may_be_one_level_deeper_are_warned_of(tmp_path: Path) -> None:
    draw(*(tmp_path / domain / name / "a.png" for domain in ("photo", "sketch") for name in ("cat", "dog")))
    source, (warning,) = opened(tmp_path)
    assert source.folders == ("photo", "sketch")
    assert "photo has them in sub-folders (cat, dog); if those are the classes, give imagefolder:" in warning
    # A class may have its pictures in one sub-folder, and some classes may have several.
    draw(tmp_path / "photo" / "a.png")
    assert opened(tmp_path)[1] == []


def test_a_single_class_is_warned_of(tmp_path: Path) -> None:
    draw(tmp_path / "cat" / "images" / "a.png")
    assert opened(tmp_path)[1] == [
        f"data {tmp_path} has one class folder only, cat: among its classes every answer is right"
    ]


def test_folders_that_cannot_be_listed_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_source(f"imagefolder:{tmp_path / ('x' * 300)}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a FIFO, not a folder"):
        open_source(f"images:{tmp_path / 'pipe'}")

    def denied(place: object) -> object:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "cat").mkdir()
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        open_source(f"imagefolder:{tmp_path}")
