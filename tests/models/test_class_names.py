"""Class names: ImageNet's by id or number, folders' own made readable, files', and what cannot be right."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from rada_fast.data.sources import FeatureFile
from rada_fast.errors import UserError
from rada_fast.models.class_names import class_names_of, resolve_class_names
from rada_fast.system import notices

SYNSETS = ImageNetInfo().label_names()


def named(*args: object, **kwargs: object) -> tuple[tuple[str, ...], list[str]]:
    """The names, and what was warned of."""
    with notices.collecting():
        return resolve_class_names(*args, **kwargs), notices.so_far()  # type: ignore[arg-type]


def test_imagenets_folders_have_open_clips_names(capsys: pytest.CaptureFixture[str]) -> None:
    names, said = named(SYNSETS, None)
    assert list(names) == list(IMAGENET_CLASSNAMES)
    # Two names occur twice in it, which is known and no fault of the data.
    assert said == []
    assert "'missile', 'sunglasses'" in capsys.readouterr().err
    # A subset keeps its own names, as the 200 folders of ImageNet-A and -R need.
    assert named(SYNSETS[7:9], None) == (tuple(IMAGENET_CLASSNAMES[7:9]), [])
    assert named([SYNSETS[1].upper(), SYNSETS[0]], None) == (("goldfish", "tench"), [])


def test_a_foreign_id_is_said_and_the_known_ones_are_named() -> None:
    names, (warning,) = named(("n00005787", "n01440764", "N01443537", "cat"), None)
    assert names == ("n00005787", "tench", "goldfish", "cat")
    assert warning.startswith("1 of 4 class folders are not among ImageNet's 1000 classes")
    assert "n00005787 (benthos); give --classes FILE with lines such as 'n00005787 NAME'" in warning
    assert "unknown to WordNet" in named(("n99999999", "n01440764"), None)[1][0]
    with pytest.raises(UserError, match="2 of 2 class folders are not among ImageNet's 1000 classes"):
        resolve_class_names(("n00005787", "n99999999"), None)
    assert named(("n00005787", "n99999999"), None, prompts=False) == (("n00005787", "n99999999"), [])


def test_a_thousand_numbers_are_imagenets_classes() -> None:
    for folders in ([str(number) for number in range(1000)], [f"{number:04}" for number in range(1000)]):
        assert named(folders, None) == (tuple(IMAGENET_CLASSNAMES), [])


@pytest.mark.parametrize("numbers", [range(10), range(1, 1001), [7]])
def test_other_numbers_are_no_names(numbers: list[int], tmp_path: Path) -> None:
    folders = [str(number) for number in numbers]
    with pytest.raises(UserError, match=r"^--classes must be given.*class folders are numbers .*'a photo of a \d.'"):
        resolve_class_names(folders, None)
    assert named(folders, None, prompts=False) == (tuple(folders), [])
    # Somebody who writes them down may have reasons: the digits of MNIST.
    path = tmp_path / "digits.txt"
    path.write_text("\n".join(folders))
    names, (warning,) = named(folders, str(path))
    assert names == tuple(folders)
    assert f"class names in {path} are or begin with numbers" in warning


def test_numbers_with_a_sign_are_no_names_either() -> None:
    with pytest.raises(UserError, match=r"class folders are numbers \(-1, 0, 1\)"):
        resolve_class_names(["-1", "0", "1"], None)


def test_a_blank_is_no_name(tmp_path: Path) -> None:
    for blank in ("", " "):
        with pytest.raises(UserError, match="class folders have no name for class 1"):
            resolve_class_names(["a", blank], None)
        assert len(resolve_class_names(["a", blank], None, prompts=False)) == 2


def test_letters_of_one_or_of_several_characters_are_the_same(tmp_path: Path) -> None:
    """Archives made on a Mac, and file systems there, write accents as characters of their own."""
    folders = [unicodedata.normalize("NFD", name) for name in ("caf\xe9", "na\xefve", "\xfcber")]
    path = tmp_path / "names.txt"
    path.write_text("\xfcber\nna\xefve\ncaf\xe9\n", "utf-8")
    assert resolve_class_names(folders, str(path)) == ("caf\xe9", "na\xefve", "\xfcber")
    path.write_text("folder,name\n\xfcber,a\nna\xefve,b\ncaf\xe9,c\n", "utf-8")
    assert resolve_class_names(folders, str(path)) == ("c", "b", "a")
    assert "occur more than once" in named([*folders, "caf\xe9"], None)[1][0]


def test_numbered_classes_are_said() -> None:
    for lines in (["0=cat", "1=dog"], ["[0] cat", "[1] dog"], ["class 0: cat", "class 1: dog"], ["#1 cat", "#2 dog"]):
        assert "begin with numbers" in named(lines, None)[1][0]
    assert "3 of 3 class names from class folders are or begin" in named(["class_1", "class_2", "c3"], None)[1][0]
    assert "1 of 2 class names" in named(["12", "cat"], None)[1][0]
    for folders in (["707-320", "727-200"], ["2012_Tesla", "2012_Audi"], ["3 Series", "cat"]):
        assert named(folders, None)[0] == tuple(folder.replace("_", " ") for folder in folders)
    assert named(["707-320", "727-200"], None)[1] == named(["3_Series", "cat"], None)[1] == []
    assert "begin with numbers" in named(["2012_Tesla", "2012_Audi"], None)[1][0]


def test_numbers_that_are_left_out_are_said_unless_they_are_surely_no_names() -> None:
    names, (warning,) = named(["0_cat", "1_dog"], None)
    assert names == ("cat", "dog")
    assert "the numbers that class folders begin with are left out of the names: '0_cat' becomes 'cat'" in warning
    assert named(["001.Black_footed_Albatross", "002.Laysan"], None) == (("Black footed Albatross", "Laysan"), [])
    assert named(["n02085620-Chihuahua", "n02085782-Pug"], None) == (("Chihuahua", "Pug"), [])


def test_class_names_from_published_and_odd_files(tmp_path: Path) -> None:
    path = tmp_path / "classnames.txt"
    path.write_text("n01440764 tench\nn01443537 gold fish\nn01484850 great white shark\n")
    # More names than folders is normal: one such file serves every ImageNet variant.
    assert resolve_class_names(["N01484850", "n01440764"], str(path)) == ("great white shark", "tench")
    with pytest.raises(UserError, match=r"must name every class folder, 1 of 2 are missing: cat"):
        resolve_class_names(["n01440764", "cat"], str(path))
    # Written by an editor that marks its files.
    path.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert resolve_class_names(["a", "b"], str(path)) == ("cat", "dog")
    # Ids alone, one a line, are ImageNet's too.
    path.write_text("n01443537\nn01440764\n")
    assert resolve_class_names(["a", "b"], str(path)) == ("goldfish", "tench")
    path.write_text("001.Black_footed_Albatross\n002.Laysan_Albatross\n")
    assert resolve_class_names(["a", "b"], str(path)) == ("Black footed Albatross", "Laysan Albatross")
    deep = tmp_path / "deep.json"
    for text, message in (
        ("[" * 100_000, "is not JSON"),
        ('["cat", " "]', "must hold a list of names"),
        ("[]", "K = 0"),
    ):
        deep.write_text(text)
        with pytest.raises(UserError, match=message):
            resolve_class_names(["a", "b"], str(deep))


def test_numbered_folders_take_names_by_number(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    folders = [str(number) for number in range(12)]
    path.write_text("\n".join(f"thing {letter}" for letter in "abcdefghijkl"))
    assert named(folders, str(path)) == (tuple(f"thing {letter}" for letter in "abcdefghijkl"), [])
    path = tmp_path / "cat_to_name.json"
    path.write_text('{"21": "fire lily", "3": "canterbury bells", "1": "pink primrose"}')
    assert resolve_class_names(["1", "3", "21"], str(path)) == ("pink primrose", "canterbury bells", "fire lily")
    assert resolve_class_names(["0001", "0021"], str(path)) == ("pink primrose", "fire lily")
    path = tmp_path / "classnames.txt"
    path.write_text("n01484850 great white shark\nn01440764 tench\nn01443537 gold fish\n")
    assert resolve_class_names(["0", "1", "2"], str(path)) == ("tench", "gold fish", "great white shark")
    with pytest.raises(UserError, match="1 of 2 are missing: 3"):
        resolve_class_names(["2", "3"], str(path))


def test_the_folders_own_names_stay_theirs_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Owl\nblack cat\ndog\nhorse\n")
    assert named(["black_cat", "dog", "owl"], str(path)) == (("black cat", "dog", "Owl"), [])
    assert "each has its own name" in capsys.readouterr().err
    path.write_text("owl\na cat\ndog\n")
    names, (warning,) = named(["cat", "dog", "owl"], str(path))
    assert names == ("owl", "a cat", "dog")
    assert "names class folder 'cat' 'owl', which is what class folder 'owl' is called" in warning


def test_names_for_folders_in_text_order_are_said(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    folders = sorted(f"class{number}" for number in range(11))
    path.write_text("\n".join("abcdefghijk"))
    (warning,) = named(folders, str(path))[1]
    assert "in which 'class10' comes before 'class2'" in warning
    assert named([f"class{number:02}" for number in range(11)], str(path))[1] == []
    # Neither the folders' own names nor names by folder can be in a wrong order.
    path.write_text("DC-3\nDC-6\nDC-10\n")
    assert named(["DC-10", "DC-3", "DC-6"], str(path)) == (("DC-10", "DC-3", "DC-6"), [])
    path.write_text("folder,name\nc10,cat\nc2,dog\n")
    assert named(["c10", "c2"], str(path)) == (("cat", "dog"), [])


def test_equal_names_are_said(tmp_path: Path) -> None:
    (warning,) = named(["cat", "Cat", "dog"], None)[1]
    assert warning == "class names occur more than once, and their classes cannot be told apart: 'cat'"
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\ncat\nmissile\nmissile\n")
    assert named(list("abcde"), str(path))[1][0].endswith("apart: 'cat', 'missile'")
    assert named(list("abcde"), str(path), prompts=False)[1] == []


def labelled(count: int) -> FeatureFile:
    """Features of so many classes, which have numbers and no names."""
    return FeatureFile(Path("f.npz"), torch.ones(count, 2), torch.arange(count), tuple(map(str, range(count))))


def test_labels_without_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f.npz has no array class_names, and a prompt needs names"):
        class_names_of(labelled(3), None, prompts=True)
    assert class_names_of(labelled(3), None, prompts=False) == ("class 0", "class 1", "class 2")
    path = tmp_path / "names.txt"
    path.write_text("a\nb\nc\nd\n")
    with notices.collecting():
        assert class_names_of(labelled(3), str(path), prompts=True) == ("a", "b", "c", "d")
        (warning,) = notices.so_far()
    assert "holds 4 names, the labels of feature file f.npz end at 2: check that they number these names" in warning
    with pytest.raises(UserError, match=r"must hold 5 names, one for each label of feature file f.npz, got 4"):
        class_names_of(labelled(5), str(path), prompts=True)
