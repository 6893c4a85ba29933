"""Names are read from lists, tables and JSON, or refused in one line where it is unclear what the name is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rada_fast.data.names import read_names, readable_names
from rada_fast.errors import UserError
from rada_fast.system import notices

FISH = {"n01440764": "tench", "n01443537": "goldfish"}
LISTED: dict[str, tuple[str, Any]] = {
    "index,name": ("0,cat\n1,great dane\n", ["cat", "great dane"]),
    "from one, in any order": ("2,dog\n1,cat\n3,owl\n", ["cat", "dog", "owl"]),
    "name,index": ("dog,1\ncat,0\n", ["cat", "dog"]),
    "header": ("index,name\n0,cat\n1,dog\n", ["cat", "dog"]),
    "header of other words": ("ClassId,SignName\n0,stop\n1,yield\n", ["stop", "yield"]),
    "tabs": ("0\tcat\n1\tdog\n", ["cat", "dog"]),
    "semicolons": ("0;cat\n1;dog\n", ["cat", "dog"]),
    "quoted": ('0,"tench, Tinca tinca"\n1,goldfish\n', ["tench, Tinca tinca", "goldfish"]),
    "commas in names": ("0,tench, Tinca tinca\n1,goldfish\n", ["tench, Tinca tinca", "goldfish"]),
    "spaces": ("0 cat\n1 great dane\n", ["cat", "great dane"]),
    "colons": ("0: cat\n1: dog\n", ["cat", "dog"]),
    "CUB": ("1 001.Black_footed_Albatross\n2 002.Laysan\n", ["001.Black_footed_Albatross", "002.Laysan"]),
    "Places365": ("/a/airfield 0\n/a/airplane_cabin 1\n", ["/a/airfield", "/a/airplane_cabin"]),
    "synset mapping": ("n01440764 tench, Tinca\nN01443537 goldfish\n", FISH | {"n01440764": "tench, Tinca"}),
    "synsets with commas": ("n01440764,tench\nn01443537,goldfish\n", FISH),
    "index, synset, name": ("0,n01440764,tench\n1,n01443537,goldfish\n", FISH),
    "folder,name header": ("folder,name\na,cat\nb,dog\n", {"a": "cat", "b": "dog"}),
    "number,folder,name": ("id,folder,name\n5,a,cat\n9,b,dog\n", {"a": "cat", "b": "dog"}),
    "names with commas": ("tench, Tinca tinca\ngoldfish, Carassius\n", ["tench, Tinca tinca", "goldfish, Carassius"]),
    "some with commas": ("tench, Tinca tinca\ngoldfish\n", ["tench, Tinca tinca", "goldfish"]),
    "numbers in names": ("747-400\nA320\n", ["747-400", "A320"]),
    "numbers that count nothing": ("7 up\n747 jumbo\n", ["7 up", "747 jumbo"]),
    "counted things": ("1 star\n2 stars\n3 stars\n", ["1 star", "2 stars", "3 stars"]),
    "grades": ("grade 0\ngrade 1\n", ["grade 0", "grade 1"]),
    "python": ("{0: 'tench, Tinca tinca',\n 1: \"goldfish\"}", ["tench, Tinca tinca", "goldfish"]),
    "JSON in a text file": ('["cat", "dog"]', ["cat", "dog"]),
    "no JSON": ("[cat]\n[dog]\n", ["[cat]", "[dog]"]),
    "deep": ("[" * 9999, ["[" * 9999]),
}  # fmt: skip


def test_lines_that_are_no_csv_are_names(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "names.txt").write_text(f"{long},a\n{long},b\n")
    assert read_names(tmp_path / "names.txt") == [f"{long},a", f"{long},b"]


@pytest.mark.parametrize("name", LISTED)
def test_names_are_read_from_lists_and_tables(tmp_path: Path, name: str) -> None:
    text, expected = LISTED[name]
    (tmp_path / "names.txt").write_text(text)
    assert read_names(tmp_path / "names.txt") == expected


def test_a_column_of_ids_is_preferred_to_one_that_counts_the_lines(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text(",id,name\n0,1,dog\n1,0,cat\n")
    assert read_names(tmp_path / "names.csv") == ["cat", "dog"]
    (tmp_path / "names.csv").write_text("0,1,cat\n1,2,dog\n")
    assert read_names(tmp_path / "names.csv") == ["cat", "dog"]


def test_the_folders_decide_which_column_holds_the_names(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    for text in ("a,cat\nb,dog\nc,owl\n", "cat,a\ndog,b\nowl,c\n", "x,y\na,cat\nb,dog\nc,owl\n"):
        path.write_text(text)
        assert read_names(path, ["a", "b"]) == {"a": "cat", "b": "dog", "c": "owl"} | (
            {"x": "y"} if "x" in text else {}
        )
    path.write_text("7,cat\n12,dog\n")
    assert read_names(path, ["7", "12"]) == {"7": "cat", "12": "dog"}
    assert read_names(path, ["007", "012"]) == {"007": "cat", "012": "dog"}
    path.write_text("name\ncat\ndog\n")
    assert read_names(path, ["a", "b"]) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5,cat\n9,dog\n", "must number its names from 0 or 1, each once, got '5, cat' first"),
        ("1,cat\n1,dog\n", "must number its names from 0 or 1"),
        ("5,cat, tom\n9,dog\n", "must number its names from 0 or 1, got '5,cat, tom' first"),
        ("0,1\n1,2\n", "must say which of its 2 columns holds the names, got '0, 1' first"),
        (
            "a\tcat\nb\tdog\n",
            "must say which of its 2 columns holds the names, got 'a, cat' first; write one name per line",
        ),
        ("0,2,cat\n1,1,dog\n2,0,owl\n", r"must number its names once, its columns 1 and 2 do it in different ways"),
        ('{"id": 0, "name": "a"}\n{"id": 1, "name": "b"}\n', "must hold names, got"),
        ('["a", "b"]\n["c", "d"]\n', "must hold names, got"),
        ("index,name\n", r"holds no class name \(K = 0\)"),
        ("0,cat\n1,\n", "must have a name in every line, line 2 of its table has none"),
        ("cat\na\tdog\n", r"must hold names without control characters, got 'a\\tdog'"),
        ("a\0b\n", r"without control characters, got 'a\\x00b'"),
    ],
)
def test_files_in_which_the_name_is_unclear_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_names(tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("text", "folders", "expected"),
    [
        ('{"0": "cat", "1": "dog"}', ["a", "b"], ["cat", "dog"]),
        ('{"0": "cat", "1": "dog"}', ["0", "1"], {"0": "cat", "1": "dog"}),
        ('{"cat": 0, "dog": 1}', [], ["cat", "dog"]),
        ('{"0": ["n01440764", "tench"]}', ["n01440764"], {"n01440764": "tench"}),
        ('{"0": ["n01440764", "tench"]}', ["0"], {"0": "tench"}),
        ('[["n01440764", "tench"]]', ["n01440764"], {"n01440764": "tench"}),
        ('{"a": "cat"}', ["a"], {"a": "cat"}),
    ],
)
def test_names_are_read_from_json_by_number_and_by_folder(
    tmp_path: Path, text: str, folders: list[str], expected: Any
) -> None:
    (tmp_path / "names.json").write_text(text)
    assert read_names(tmp_path / "names.json", folders) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "cat", "a": "dog"}', "must name every class once, 'a' comes twice"),
        ('{"cat": 0, "dog": 0}', "must give every name a number of its own"),
        ('{"cat": true}', "must hold a list of names, or an object"),
        ('{"a": {"b": "c"}}', "must hold a list of names, or an object"),
        ('[["a", ["b"]]]', "must hold a list of names, or an object"),
        ('"cat"', "must hold a list of names, or an object"),
        ("[" + "9" * 5000 + "]", "is not JSON"),
    ],
)
def test_json_without_names_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_names(tmp_path / "names.json")


def test_doubtful_names_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    for text, message in (
        ("cat, dog, owl\n", "has one line, taken as one name; write one name per line"),
        ("0 cat\n1 great dane\n", "are taken for the classes' numbers, not for parts of the names: '0 cat' is 'cat'"),
        ("cat 0\ndog 1\n", "are taken for the classes' numbers, not for parts of the names: 'cat 0' is 'cat'"),
        ("tench, Tinca\ngoldfish, Carassius\n", "the commas are taken as parts of the names, such as 'tench, Tinca'"),
    ):
        path.write_text(text)
        with notices.collecting():
            read_names(path)
            (warning,) = notices.so_far()
        assert message in warning


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["001.Black_footed_Albatross", "014.Indigo_Bunting"], ["Black footed Albatross", "Indigo Bunting"]),
        (["n02085620-Chihuahua", "N02085782-Japanese_spaniel"], ["Chihuahua", "Japanese spaniel"]),
        (["0_cat", "1_dog"], ["cat", "dog"]),
        (["01-cat", "07-dog"], ["cat", "dog"]),
        # These numbers may not count classes: not every name has one, one occurs twice, or nothing follows them.
        (["3_Series", "cat"], ["3 Series", "cat"]),
        (["2012_Tesla", "2012_Audi"], ["2012 Tesla", "2012 Audi"]),
        (["707-320", "727-200"], ["707-320", "727-200"]),
        (["1_star", "2_stars", "3_stars"], ["1 star", "2 stars", "3 stars"]),
        (["7_up", "12_angry_men"], ["7 up", "12 angry men"]),
        (["great_white__shark", " tench "], ["great white shark", "tench"]),
        (["_", "1"], ["_", "1"]),
        ([], []),
    ],
)
def test_names_of_folders_are_made_readable(names: list[str], expected: list[str]) -> None:
    assert readable_names(names) == tuple(expected)


def test_names_are_read_from_files(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, Any]] = {
        "lines.txt": ("cat\n\n dog \n", ["cat", "dog"]),
        "coop.txt": ("n01440764 tench\nn01443537 gold fish\n", {"n01440764": "tench", "n01443537": "gold fish"}),
        "list.json": ('["cat", "dog"]', ["cat", "dog"]),
        "object.json": ('{"a": "cat"}', {"a": "cat"}),
    }
    for name, (text, expected) in cases.items():
        (tmp_path / name).write_text(text)
        assert read_names(tmp_path / name) == expected
    for name, text, message in (
        ("empty.txt", "\n", r"holds no class name \(K = 0\)"),
        ("bad.json", "{", "is not JSON"),
        ("numbers.json", "[1, 2]", "must hold a list of names"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_names(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a text file"):
        read_names(tmp_path / "binary.txt")
