"""Tables of paths are read with labels, names, captions and parts, whichever way their columns are called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.system import notices
from tests.pictures import write_class_folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with pictures/cat/0.png, pictures/cat/1.png and the same for dog and owl."""
    write_class_folders(tmp_path / "pictures", ("cat", "dog", "owl"), each=2)
    return tmp_path


def opened(path: Path, text: str, part: str = "") -> tuple[ImageFolder, list[str]]:
    """Write a table and return its source and the warnings."""
    path.write_text(text)
    with notices.collecting():
        source = open_source(f"csv:{path}{part}")
        assert isinstance(source, ImageFolder)
        return source, notices.so_far()


def test_labels_names_or_both(root: Path) -> None:
    numbered, _ = opened(root / "a.csv", "path,label\npictures/dog/0.png,1\npictures/cat/0.png,0\n")
    assert (numbered.folders, numbered.labels.tolist()) == (("0", "1"), [1, 0])
    assert numbered.ids == ("pictures/dog/0.png", "pictures/cat/0.png")
    named, _ = opened(root / "b.tsv", "label\tfile name\ndog\tpictures/dog/0.png\ncat\tpictures/cat/0.png\n")
    assert (named.folders, named.labels.tolist()) == (("cat", "dog"), [1, 0])
    text = 'Image;Class ID;Class Name\npictures/dog/0.png;0;"dog; big"\npictures/cat/0.png;1;cat\n'
    both, _ = opened(root / "c.csv", text)
    assert (both.folders, both.labels.tolist()) == (("dog; big", "cat"), [0, 1])
    alone, _ = opened(root / "d.csv", "filepath,width\npictures/cat/0.png,7\n")
    assert (alone.folders, alone.labels.tolist()) == ((), [-1])
    gaps, warnings = opened(root / "e.csv", "path,label\npictures/dog/0.png,2\npictures/cat/0.png,1\n")
    assert gaps.num_classes == 3
    assert "labels begin at 1, not at 0" in warnings[0]


def test_parts(root: Path) -> None:
    text = "path,label,split\npictures/cat/0.png,0,train\npictures/cat/1.png,0,Validation\npictures/dog/0.png,1,train\n"
    assert len(opened(root / "a.csv", text, "@train")[0].samples) == 2
    assert opened(root / "a.csv", text)[0].ids == ("pictures/cat/1.png",)
    with pytest.raises(UserError, match="line 2 must name the part train, val or test, got 'fold 1'"):
        opened(root / "a.csv", text.replace("0,train", "0,fold 1"))
    with pytest.raises(UserError, match="has no picture of train, it has val"):
        opened(root / "a.csv", text.replace("train", "val"), "@train")


def test_every_part_has_the_classes_of_the_whole_table(root: Path) -> None:
    rows = "pictures/cat/0.png,cat,train\npictures/dog/0.png,dog,train\npictures/dog/1.png,dog,test\n"
    source, _ = opened(root / "a.csv", f"path,class,split\n{rows}pictures/owl/0.png,,val\n")
    assert (source.folders, source.labels.tolist()) == (("cat", "dog"), [1])
    assert not open_source(f"csv:{root}/a.csv@val").has_classes
    rows = "pictures/cat/0.png,0,train\npictures/owl/0.png,10,train\npictures/dog/0.png,,test\n"
    assert opened(root / "b.csv", f"path,label,split\n{rows}", "@train")[0].labels.tolist() == [0, 10]


def test_numbers_from_1_with_gaps_or_written_as_decimals(root: Path) -> None:
    rows = "pictures/owl/0.png,10,owl\npictures/cat/0.png,1,cat\npictures/dog/0.png,2,dog\n"
    source, warnings = opened(root / "a.csv", f"path,label,class_name\n{rows}")
    assert (source.folders, source.labels.tolist()) == (("cat", "dog", "owl"), [2, 0, 1])
    assert "have labels between 1 and 10; they are numbered anew" in warnings[0]
    source, _ = opened(root / "b.csv", "path,label\npictures/owl/0.png,10.0\npictures/cat/0.png,2.0\n")
    assert (source.num_classes, source.labels.tolist()) == (11, [10, 2])
    with pytest.raises(UserError, match=r"line 2 must have a label in 0 ... 1048575, got '-1'"):
        opened(root / "c.csv", "path,label\npictures/owl/0.png,-1\npictures/cat/0.png,2\n")


def test_tables_of_windows_and_excel(root: Path) -> None:
    text = "\ufeffsep=;\nImage Name;label\npictures\\owl\\0.png;1\npictures\\cat\\0.png;0\n"
    source, _ = opened(root / "a.csv", text)
    assert (source.ids, source.labels.tolist()) == (("pictures/owl/0.png", "pictures/cat/0.png"), [1, 0])
    text = '"path"\t"label (a, b, c)"\t"class"\n"pictures/owl/0.png"\t""\t"owl"\n'
    assert opened(root / "b.tsv", text)[0].folders == ("owl",)


def test_paths_start_from_the_table_or_above_or_are_absolute(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["pictures/cat/0.png,0", "pictures/dog/0.png,1"]
    (root / "lists" / "deep").mkdir(parents=True)
    for path in (root / "a.csv", root / "lists" / "a.csv", root / "lists" / "deep" / "a.csv"):
        source, _ = opened(path, "path,label\n" + "\n".join(rows))
        assert all(isinstance(sample.path, Path) and sample.path.is_file() for sample in source.samples)
    monkeypatch.chdir(root / "pictures")
    source, _ = opened(root / "b.csv", "path,label\n./cat/0.png,0\n./dog/0.png,1")
    assert source.ids == ("cat/0.png", "dog/0.png")
    absolute = "\n".join(f"{root}/{row}" for row in rows)
    source, _ = opened(root / "c.csv", f"path,label\n{absolute}")
    assert source.ids == ("cat/0.png", "dog/0.png")


def flyp(root: Path, names: dict[str, str], templates: tuple[str, ...]) -> str:
    """Return a table of FLYP: each picture with each template, captions without quotation marks."""
    rows = [
        f"{template.format(names[folder])}\t{root}/pictures/{folder}/{index}.png"
        for folder in sorted(names)
        for index in range(2)
        for template in templates
    ]
    return "title\tfilepath\n" + "\n".join(rows)


def test_flyps_tables_have_captions(root: Path) -> None:
    names = {"cat": "Maine Coon", "dog": 'dog, "big"', "owl": "owl"}
    for templates in (("a photo of a {}.", 'a "{}" in a video game.'), ("{}",), ("a photo of a {}.",)):
        source, warnings = opened(root / "flyp.csv", flyp(root, names, templates))
        assert not warnings
        assert source.folders == ("cat", "dog", "owl")
        assert source.names == ("Maine Coon", 'dog, "big"', "owl")
        assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    flat = "title\tfilepath\n" + "\n".join(f"a {n}.\tpictures/cat/{i}.png" for n, i in (("x y", 0), ("b", 1)))
    source, _ = opened(root / "flat.csv", flat)
    assert (source.folders, source.labels.tolist()) == (("b", "x y"), [1, 0])
    many = "title\tfilepath\n" + "\n".join(f"caption {n}\tpictures/{c}/{i}.png" for n, (c, i) in enumerate(
        (c, i) for c in ("cat", "dog", "owl") for i in (0, 1)))  # fmt: skip
    with pytest.raises(UserError, match="its captions do not tell classes apart"):
        opened(root / "many.csv", many)


def test_unusable_tables_are_refused(root: Path) -> None:
    one = "pictures/cat/0.png"
    for text, message in (
        ("", "must have a line with the names of its columns and one for each picture"),
        ("path,label\n", "must have a line with the names"),
        ("path,label\n\n,\n", "lists no picture"),
        (f"a,b\n{one},1\n", "its first line must name a column of paths, such as path or filepath, it has 'a, b'"),
        (f"path,label\n{one}\n", "line 2 has 1 cells, the first line 2"),
        ("path,label\n,1\n", "line 2 has no path"),
        (f"path,target\n{one},x\n", "line 2 must have a label in 0"),
        (f"path,target\n{one},99999999\n", "line 2 must have a label in 0"),
        (f"path,label\n{one},cat\n{one},dog\n", "lines 2 and 3 give 'pictures/cat/0.png' different classes"),
        (f"path,y,name\n{one},0,cat\npictures/dog/0.png,0,dog\n", "line 3 calls the label 0 'dog', an earlier line"),
        (f"path,label\n{one},cat\npictures/dog/0.png,\n", "line 3 has no class, other lines of test have one"),
        ("path,label\nnone.png,1\n", r"none of its 1 pictures exists, the first is .*none\.png"),
        (f'path,label\n"{one},1\n', "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            opened(root / "a.csv", text)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        open_source(f"csv:{root}/none.csv")
    os.mkfifo(root / "fifo.csv")
    with pytest.raises(UserError, match="cannot be read: it is a FIFO, not a file"):
        open_source(f"csv:{root}/fifo.csv")
    (root / "binary.csv").write_bytes(b"path\n\xff\xfe")
    with pytest.raises(UserError, match="is not a text file"):
        open_source(f"csv:{root}/binary.csv")


def test_missing_and_repeated_pictures_are_reported(root: Path) -> None:
    source, warnings = opened(root / "a.csv", "path,label\npictures/cat/0.png,0\npictures/cat/9.png,0\n")
    assert len(source.samples) == 2
    assert "1 of its 2 pictures do not exist and will count as unreadable: pictures/cat/9.png" in warnings[0]
    source, warnings = opened(root / "a.csv", "path,label\npictures/cat/0.png,0\npictures/cat/0.png,0\n")
    assert len(source.samples) == 1
    assert "1 rows repeat a picture" in warnings[0]


def test_a_picture_in_no_folder_counts_as_unreadable(root: Path) -> None:
    """Its folder is no disk that has gone while the run went on, so the run does not end."""
    source, _ = opened(root / "a.csv", "path,label\npictures/cat/0.png,0\nnowhere/1.png,0\n")
    with pytest.raises(UnreadableImageError, match=r"1\.png cannot be read: No such file"):
        read_image(source.samples[1].path)
