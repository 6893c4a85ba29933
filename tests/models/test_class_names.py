"""Class names come from ImageNet's ids or numbers, from folders or from files, and wrong names are refused."""

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


def names_and_warnings(*args: object, **kwargs: object) -> tuple[tuple[str, ...], list[str]]:
    """Return the class names and the warnings."""
    with notices.collecting():
        return resolve_class_names(*args, **kwargs), notices.so_far()  # type: ignore[arg-type]


def test_folders_with_ids_of_imagenet_have_open_clips_names(capsys: pytest.CaptureFixture[str]) -> None:
    names, warnings = names_and_warnings(SYNSETS, None)
    assert list(names) == list(IMAGENET_CLASSNAMES)
    # Two names occur twice in ImageNet, which is known and not a fault of the data.
    assert warnings == []
    assert "'missile', 'sunglasses'" in capsys.readouterr().err
    # The folders of a subset have the same names, as ImageNet-A and -R with their 200 folders need.
    assert names_and_warnings(SYNSETS[7:9], None) == (tuple(IMAGENET_CLASSNAMES[7:9]), [])
    assert names_and_warnings([SYNSETS[1].upper(), SYNSETS[0]], None) == (("goldfish", "tench"), [])


def test_an_unknown_id_is_warned_of_and_the_known_ones_are_named() -> None:
    names, (warning,) = names_and_warnings(("n00005787", "n01440764", "N01443537", "cat"), None)
    assert names == ("n00005787", "tench", "goldfish", "cat")
    assert warning.startswith("1 of 4 class folders are not among ImageNet's 1000 classes")
    assert "n00005787 (benthos); give --classes FILE with lines such as 'n00005787 NAME'" in warning
    assert "unknown to WordNet" in names_and_warnings(("n99999999", "n01440764"), None)[1][0]
    with pytest.raises(UserError, match="2 of 2 class folders are not among ImageNet's 1000 classes"):
        resolve_class_names(("n00005787", "n99999999"), None)
    assert names_and_warnings(("n00005787", "n99999999"), None, prompts=False) == (("n00005787", "n99999999"), [])


def test_a_thousand_numbers_are_imagenets_classes() -> None:
    for folders in ([str(number) for number in range(1000)], [f"{number:04}" for number in range(1000)]):
        assert names_and_warnings(folders, None) == (tuple(IMAGENET_CLASSNAMES), [])


@pytest.mark.parametrize("numbers", [range(10), range(1, 1001), [7]])
def test_other_numbers_are_refused_as_names(numbers: list[int], tmp_path: Path) -> None:
    folders = [str(number) for number in numbers]
    with pytest.raises(UserError, match=r"^--classes must be given.*class folders are numbers .*'a photo of a \d.'"):
        resolve_class_names(folders, None)
    assert names_and_warnings(folders, None, prompts=False) == (tuple(folders), [])
    # Names that are given in a file may be numbers, for instance the digits of MNIST.
    path = tmp_path / "digits.txt"
    path.write_text("\n".join(folders))
    names, (warning,) = names_and_warnings(folders, str(path))
    assert names == tuple(folders)
    assert f"class names in {path} are or begin with numbers" in warning


def test_numbers_with_a_sign_are_refused_as_names() -> None:
    with pytest.raises(UserError, match=r"class folders are numbers \(-1, 0, 1\)"):
        resolve_class_names(["-1", "0", "1"], None)


def test_blank_names_are_refused(tmp_path: Path) -> None:
    for blank in ("", " "):
        with pytest.raises(UserError, match="class folders have no name for class 1"):
            resolve_class_names(["a", blank], None)
        assert len(resolve_class_names(["a", blank], None, prompts=False)) == 2


def test_composed_and_decomposed_letters_are_equal(tmp_path: Path) -> None:
    """Archives and file systems of a Mac write accents as characters of their own."""
    folders = [unicodedata.normalize("NFD", name) for name in ("caf\xe9", "na\xefve", "\xfcber")]
    path = tmp_path / "names.txt"
    path.write_text("\xfcber\nna\xefve\ncaf\xe9\n", "utf-8")
    assert resolve_class_names(folders, str(path)) == ("caf\xe9", "na\xefve", "\xfcber")
    path.write_text("folder,name\n\xfcber,a\nna\xefve,b\ncaf\xe9,c\n", "utf-8")
    assert resolve_class_names(folders, str(path)) == ("c", "b", "a")
    assert "occur more than once" in names_and_warnings([*folders, "caf\xe9"], None)[1][0]


def test_names_such_as_class_1_are_warned_of() -> None:
    for lines in (["0=cat", "1=dog"], ["[0] cat", "[1] dog"], ["class 0: cat", "class 1: dog"], ["#1 cat", "#2 dog"]):
        assert "begin with numbers" in names_and_warnings(lines, None)[1][0]
    assert (
        "3 of 3 class names from class folders are or begin"
        in names_and_warnings(["class_1", "class_2", "c3"], None)[1][0]
    )
    assert "1 of 2 class names" in names_and_warnings(["12", "cat"], None)[1][0]
    for folders in (["707-320", "727-200"], ["2012_Tesla", "2012_Audi"], ["3 Series", "cat"]):
        assert names_and_warnings(folders, None)[0] == tuple(folder.replace("_", " ") for folder in folders)
    assert names_and_warnings(["707-320", "727-200"], None)[1] == names_and_warnings(["3_Series", "cat"], None)[1] == []
    assert "begin with numbers" in names_and_warnings(["2012_Tesla", "2012_Audi"], None)[1][0]


def test_removed_numbers_are_warned_of_unless_they_cannot_be_names() -> None:
    names, (warning,) = names_and_warnings(["0_cat", "1_dog"], None)
    assert names == ("cat", "dog")
    assert "the numbers that class folders begin with are left out of the names: '0_cat' becomes 'cat'" in warning
    assert names_and_warnings(["001.Black_footed_Albatross", "002.Laysan"], None) == (
        ("Black footed Albatross", "Laysan"),
        [],
    )
    assert names_and_warnings(["n02085620-Chihuahua", "n02085782-Pug"], None) == (("Chihuahua", "Pug"), [])


def test_class_names_from_published_and_odd_files(tmp_path: Path) -> None:
    path = tmp_path / "classnames.txt"
    path.write_text("n01440764 tench\nn01443537 gold fish\nn01484850 great white shark\n")
    # A file may hold more names than there are folders: one file serves every ImageNet variant.
    assert resolve_class_names(["N01484850", "n01440764"], str(path)) == ("great white shark", "tench")
    with pytest.raises(UserError, match=r"must name every class folder, 1 of 2 are missing: cat"):
        resolve_class_names(["n01440764", "cat"], str(path))
    # Some editors begin a file with a byte-order mark.
    path.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert resolve_class_names(["a", "b"], str(path)) == ("cat", "dog")
    # A file may hold only ids of ImageNet, one per line.
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
    assert names_and_warnings(folders, str(path)) == (tuple(f"thing {letter}" for letter in "abcdefghijkl"), [])
    path = tmp_path / "cat_to_name.json"
    path.write_text('{"21": "fire lily", "3": "canterbury bells", "1": "pink primrose"}')
    assert resolve_class_names(["1", "3", "21"], str(path)) == ("pink primrose", "canterbury bells", "fire lily")
    assert resolve_class_names(["0001", "0021"], str(path)) == ("pink primrose", "fire lily")
    path = tmp_path / "classnames.txt"
    path.write_text("n01484850 great white shark\nn01440764 tench\nn01443537 gold fish\n")
    assert resolve_class_names(["0", "1", "2"], str(path)) == ("tench", "gold fish", "great white shark")
    with pytest.raises(UserError, match="1 of 2 are missing: 3"):
        resolve_class_names(["2", "3"], str(path))


def test_the_folders_own_names_may_be_listed_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Owl\nblack cat\ndog\nhorse\n")
    assert names_and_warnings(["black_cat", "dog", "owl"], str(path)) == (("black cat", "dog", "Owl"), [])
    assert "the names are matched" in capsys.readouterr().err
    path.write_text("owl\na cat\ndog\n")
    names, (warning,) = names_and_warnings(["cat", "dog", "owl"], str(path))
    assert names == ("owl", "a cat", "dog")
    assert "names class folder 'cat' 'owl', which is what class folder 'owl' is called" in warning


def test_names_for_folders_in_text_order_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    folders = sorted(f"class{number}" for number in range(11))
    path.write_text("\n".join("abcdefghijk"))
    (warning,) = names_and_warnings(folders, str(path))[1]
    assert "in which 'class10' comes before 'class2'" in warning
    assert names_and_warnings([f"class{number:02}" for number in range(11)], str(path))[1] == []
    # Names that are the folders' own, or that are listed by folder, cannot be in a wrong order.
    path.write_text("DC-3\nDC-6\nDC-10\n")
    assert names_and_warnings(["DC-10", "DC-3", "DC-6"], str(path)) == (("DC-10", "DC-3", "DC-6"), [])
    path.write_text("folder,name\nc10,cat\nc2,dog\n")
    assert names_and_warnings(["c10", "c2"], str(path)) == (("cat", "dog"), [])


def test_equal_names_are_warned_of(tmp_path: Path) -> None:
    (warning,) = names_and_warnings(["cat", "Cat", "dog"], None)[1]
    assert warning == "class names occur more than once, and their classes cannot be told apart: 'cat'"
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\ncat\nmissile\nmissile\n")
    assert names_and_warnings(list("abcde"), str(path))[1][0].endswith("apart: 'cat', 'missile'")
    assert names_and_warnings(list("abcde"), str(path), prompts=False)[1] == []


def labelled(count: int) -> FeatureFile:
    """Return features of so many classes, which have numbers but no names."""
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
