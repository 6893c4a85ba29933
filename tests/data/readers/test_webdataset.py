"""Tar shards are read in place: labels, names, parts; hostile, damaged and compressed ones harm nothing."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from rada_fast.data.decode import UnreadableImageError, read_image
from rada_fast.data.open import open_source
from rada_fast.data.readers.webdataset import expand
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError
from rada_fast.system import notices


def picture(colour: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def labelled(*labels: int, first: int = 0) -> dict[str, bytes]:
    members = {}
    for index, label in enumerate(labels, start=first):
        members |= {f"s{index:07}.png": picture(index), f"s{index:07}.cls": str(label).encode()}
    return members


def opened(spec: str) -> tuple[ImageFolder, list[str]]:
    """Return the source and the warnings."""
    with notices.collecting():
        source = open_source(spec)
        assert isinstance(source, ImageFolder)
        return source, notices.so_far()


def test_braces_count_and_list() -> None:
    assert expand("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand("{0..2}") == ["0", "1", "2"]
    assert expand("{11..09}") == ["11", "10", "09"]
    assert expand("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand("plain{}.tar") == ["plain{}.tar"]
    for bomb in ("{0..99999999}", "{0..999}{0..999}", "{a,b}" * 40):
        with pytest.raises(UserError, match="stands for more than 100000 archives"):
            expand(bomb)


def test_shards_are_read_by_pattern_by_list_by_glob_and_by_folder(tmp_path: Path) -> None:
    for shard in range(11):
        write_shard(tmp_path / f"{shard:03}.tar", labelled(shard % 3, 2, first=2 * shard))
    for pattern in ("{000..010}.tar", "*.tar", ""):
        source, warnings = opened(f"webdataset:{tmp_path}/{pattern}")
        assert not warnings
        assert source.folders == ("0", "1", "2")
        assert source.labels.tolist() == [label for shard in range(11) for label in (shard % 3, 2)]
        assert source.ids[:3] == ("000.tar/s0000000.png", "000.tar/s0000001.png", "001.tar/s0000002.png")
        assert [read_image(sample.path).getpixel((0, 0)) for sample in source.samples[:2]] == [(0, 0, 0), (1, 0, 0)]
    one, _ = opened(f"webdataset:{tmp_path}/003.tar")
    assert one.ids == ("s0000006.png", "s0000007.png")


def test_the_layout_of_clip_benchmark_has_parts_and_names(tmp_path: Path) -> None:
    for shard in (0, 1, 10, 2):
        write_shard(tmp_path / "test" / f"{shard}.tar", labelled(1, first=shard))
    write_shard(tmp_path / "train" / "0.tar", labelled(0, 1, 0))
    (tmp_path / "test" / "nshards.txt").write_text("4\n")
    (tmp_path / "classnames.txt").write_text("red fox\nblack_cat\n")
    source, _ = opened(f"webdataset:{tmp_path}")
    assert source.names == ("red fox", "black cat")
    assert [sample.id.partition("/")[0] for sample in source.samples] == ["0.tar", "1.tar", "2.tar", "10.tar"]
    assert len(open_source(f"webdataset:{tmp_path}", "train").ids) == 3
    with pytest.raises(UserError, match="has no folder for val, it has train, test"):
        open_source(f"webdataset:{tmp_path}@val")
    assert opened(f"webdataset:{tmp_path}/train/0.tar")[0].names == source.names
    (tmp_path / "classnames.txt").write_text("red fox\n")
    with pytest.raises(UserError, match=r"classnames\.txt lists 1 classes, but webdataset .* has the label 1"):
        opened(f"webdataset:{tmp_path}")


def test_labels_come_from_json_and_text(tmp_path: Path) -> None:
    fields = [{"label": 1, "class_name": "cat"}, {"label": 0, "class_name": "owl"}]
    members = {}
    for index, value in enumerate(fields):
        members |= {f"{index}.jpg": picture(), f"{index}.json": json.dumps(value).encode()}
    source, _ = opened(f"webdataset:{write_shard(tmp_path / 'a.tar', members)}")
    assert (source.folders, source.labels.tolist()) == (("owl", "cat"), [1, 0])
    members = {}
    for index, name in enumerate(["cat", "owl", "cat", "owl"]):
        members |= {f"{index}.jpg": picture(), f"{index}.txt": name.encode()}
    source, _ = opened(f"webdataset:{write_shard(tmp_path / 'b.tar', members)}")
    assert (source.folders, source.labels.tolist()) == (("cat", "owl"), [0, 1, 0, 1])
    captions = {f"{index}.txt": f"caption {index}".encode() for index in range(4)}
    source, warnings = opened(f"webdataset:{write_shard(tmp_path / 'c.tar', members | captions)}")
    assert not source.has_classes
    assert "taken for captions" in warnings[0]
    source, _ = opened(f"webdataset:{write_shard(tmp_path / 'd.tar', {'1.jpg': picture(), '2.jpg': picture()})}")
    assert source.labels.tolist() == [-1, -1]


def test_names_of_members_and_captions_do_not_decide_labels_by_mistake(tmp_path: Path) -> None:
    one = picture()
    members = {"./a.JPG": one, "a.cls": b"1", "b.jpg": one, "./b.cls": b"0", "./._a.JPG": b"x", "./._a.cls": b"x"}
    source, warnings = opened(f"webdataset:{write_shard(tmp_path / 'A.TAR', members | {'c.cls': b'2'})}")
    assert dict(zip(source.ids, source.labels.tolist(), strict=True)) == {"a.JPG": 1, "b.jpg": 0}
    assert "3 entries were skipped" in warnings[0]
    assert "A.TAR/c.cls (beside no picture)" in warnings[0]
    assert opened(f"webdataset:{tmp_path}")[0].labels.tolist() == source.labels.tolist()
    captions = {"a.jpg": one, "a.cls": b"1", "a.txt": b"a red dog", "b.jpg": one, "b.cls": b"0", "b.txt": b"two cats"}
    assert opened(f"webdataset:{write_shard(tmp_path / 'b.tar', captions)}")[0].folders == ("0", "1")
    named = {"a.jpg": one, "a.json": b'{"label": "dog"}', "b.jpg": one, "b.json": b'{"label": "cat"}'}
    assert opened(f"webdataset:{write_shard(tmp_path / 'c.tar', named)}")[0].folders == ("cat", "dog")
    decimal = {"a.jpg": one, "a.json": b'{"label": 1.0}', "b.jpg": one, "b.json": b'{"label": 2.0}'}
    source, warnings = opened(f"webdataset:{write_shard(tmp_path / 'd.tar', decimal)}")
    assert source.labels.tolist() == [1, 2]
    assert "labels begin at 1, not at 0" in warnings[0]


def test_names_that_only_occur_in_texts_are_those_of_one_part(tmp_path: Path) -> None:
    members = {
        f"{index}.{ending}": data for index in range(4) for ending, data in (("png", picture()), ("txt", b"owl"))
    }
    write_shard(tmp_path / "train" / "0.tar", members | {"5.png": picture(), "5.txt": b"cat"})
    write_shard(tmp_path / "test" / "0.tar", members)
    source, warnings = opened(f"webdataset:{tmp_path}")
    assert source.folders == ("owl",)
    assert "its classes are only the names that occur in" in warnings[0]
    (tmp_path / "classnames.txt").write_text("cat\nowl\n")
    source, warnings = opened(f"webdataset:{tmp_path}")
    assert (source.folders, set(source.labels.tolist()), warnings) == (("cat", "owl"), {1}, [])


def test_nothing_is_written_and_names_are_no_paths(tmp_path: Path) -> None:
    shard = tmp_path / "deep" / "er" / "a.tar"
    members = {"../../outside.png": picture(1), "/etc/absolute.png": picture(2), "a\n.png": picture(3)}
    labels = {name.replace(".png", ".cls"): b"0" for name in members}
    write_shard(shard, members | labels)
    with tarfile.open(shard, "a") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x"), (tarfile.FIFOTYPE, "")):
            member = tarfile.TarInfo(f"{kind!r}.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    source, warnings = opened(f"webdataset:{shard}")
    assert [read_image(sample.path).getpixel((0, 0))[0] for sample in source.samples] == [1, 2, 3]  # type: ignore[index]
    assert len(source.skipped) == 3
    assert len(warnings) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_places_in_archives_survive_processes_and_notice_changes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", labelled(0))
    (sample,) = opened(f"webdataset:{shard}")[0].samples
    assert pickle.loads(pickle.dumps(sample)) == sample
    stamps = opened(f"webdataset:{shard}")[0].stamps()
    assert opened(f"webdataset:{shard}")[0].stamps() == stamps
    shard.write_bytes(shard.read_bytes()[:540])
    with pytest.raises(
        UnreadableImageError, match=r"a\.tar/s0000000\.png cannot be read: its archive has become shorter"
    ):
        read_image(sample.path)
    write_shard(tmp_path / "b.tar", labelled(1))  # an empty folder would count as the place of a disk that has gone
    shard.unlink()
    with pytest.raises(UnreadableImageError, match=r"s0000000\.png cannot be read: No such file"):
        read_image(sample.path)


def test_unusable_archives_are_refused(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", labelled(0, 1, 2)).read_bytes()
    cases = {
        "empty.tar": (b"", "is not a whole tar archive"),
        "text.tar": (b"hello" * 500, "is not a whole tar archive"),
        "cut.tar": (whole[:700], "is not a whole tar archive"),
        "damaged.tar": (whole[:1024] + b"x" * 512 + whole[1536:], "is not a whole tar archive: damaged at byte 1024"),
        "packed.tar.gz": (gzip.compress(whole), "is compressed; decompress it first"),
        "packed.tar": (gzip.compress(whole), "is compressed; decompress it first"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            opened(f"webdataset:{tmp_path / name}")
    for name, members, message in (
        ("none.tar", {"notes.md": b"x"}, "hold no picture"),
        ("label.tar", {"a.png": picture(), "a.cls": b"cat"}, "must hold the number of a class, got 'cat'"),
        ("large.tar", {"a.png": picture(), "a.cls": b"9999999"}, "the label 9999999, which must lie in 0"),
        ("bomb.tar", {"a.png": picture(), "a.json": b"[" * 10**6}, r"a\.json is not readable"),
        ("long.tar", {"a.png": picture(), "a.txt": b"x" * 2**21}, "which no label has"),
        ("some.tar", labelled(0) | {"b.png": picture()}, r"1 of 2 pictures have no label: some\.tar/b\.png"),
    ):
        with pytest.raises(UserError, match=message):
            opened(f"webdataset:{write_shard(tmp_path / name, members)}")
    for pattern, message in (
        ("{000..002}.tar", "3 of 3 archives do not exist"),
        ("*.zip", "no archive matches"),
        ("whole.tar{,}", "names an archive twice"),
    ):
        with pytest.raises(UserError, match=message):
            opened(f"webdataset:{tmp_path}/{pattern}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tar archive; it is empty"):
        opened(f"webdataset:{tmp_path}/folder")
    for remote in ("https://example.com/{0..9}.tar", "pipe:cat a.tar", "s3://bucket/a.tar"):
        with pytest.raises(UserError, match="reads archives on disk"):
            opened(f"webdataset:{remote}")


def test_labels_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    dotted = {"v1.a.jpg": picture(), "v1.a.cls": b"0", "v1.b.jpg": picture(), "v1.b.cls": b"1"}
    both = {"a.jpg": picture(), "a.cls": b"0", "a.json": b'{"label": 1}'}
    for name, members in (("a.tar", dotted), ("b.tar", both)):
        with pytest.raises(UserError, match=r"has the label 1, .* the label 0; they belong together"):
            opened(f"webdataset:{write_shard(tmp_path / name, members)}")


def test_an_archive_without_its_end_is_read_with_a_warning(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", labelled(0, 1))
    path.write_bytes(path.read_bytes()[: 4 * 1024])
    source, warnings = opened(f"webdataset:{path}")
    assert len(source.samples) == 2
    assert "has no end mark" in warnings[0]
