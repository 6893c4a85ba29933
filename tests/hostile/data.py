"""Hostile features, archives, splits, tables, names, options and pictures."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from tests.hostile.planting import MARK, Evil, case, evil_zip, given, on_pictures, ttt
from tests.miniatures import write_coop
from tests.pictures import write_picture


@case("features: pickled objects")
def _(folder: Path) -> list[str]:
    np.savez(folder / "bad.npz", features=np.array([Evil(), Evil()], dtype=object), labels=np.arange(2))
    return ttt(folder, data=f"features:{folder}/bad.npz")


@case("features: pickled names")
def _(folder: Path) -> list[str]:
    rows = np.ones((2, 16), np.float32)
    np.savez(folder / "bad.npz", features=rows, labels=np.arange(2), ids=np.array([Evil(), "b"], dtype=object))
    return ttt(folder, data=f"features:{folder}/bad.npz")


@case("features: a bomb of zeros")
def _(folder: Path) -> list[str]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**31, 512)})
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", b"")
        with archive.open("features.npy", "w") as file:
            file.write(header.getvalue())
            for _ in range(64):
                file.write(b"\0" * 2**20)
    return ttt(folder, data=f"features:{folder}/bomb.npz")


@case("features: text features of an archive with paths")
def _(folder: Path) -> list[str]:
    evil_zip(folder / "text.npz", name="../features.npy")
    arguments = ttt(folder)
    evil_zip(folder / "text.npz", name="../features.npy")
    return arguments


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


def picture_bytes(folder: Path) -> bytes:
    write_picture(folder / "one.png", (9, 9, 9), size=32)
    return (folder / "one.png").read_bytes()


@case("tar: paths outside, links, devices and pickles", 0, 2, 3)
def _(folder: Path) -> list[str]:
    content = picture_bytes(folder)
    members = [
        (member("../../victim.png"), content), (member("../../victim.cls"), b"0"),
        (member("/tmp/rada_fast_victim.png"), content), (member("/tmp/rada_fast_victim.cls"), b"1"),
        (member("link.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (member("link.cls"), b"0"),
        (member("hard.png", tarfile.LNKTYPE, "../../victim"), b""), (member("hard.cls"), b"1"),
        (member("pipe.png", tarfile.FIFOTYPE), b""), (member("pipe.cls"), b"1"),
        (member("device.png", tarfile.CHRTYPE), b""), (member("device.cls"), b"1"),
        (member("good.png"), content), (member("good.cls"), b"0"), (member("good.pyd"), pickle.dumps(Evil())),
        (member("other.png"), content), (member("other.cls"), b"1"), (member("other.pickle"), pickle.dumps(Evil())),
    ]  # fmt: skip
    return on_tar(folder, members)


def on_tar(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> list[str]:
    """Write an archive of two classes, and return the arguments of ttt on it."""
    (folder / "data").mkdir()
    write_tar(folder / "data" / "0.tar", members)
    (folder / "names.txt").write_text("red\nblue\n")
    values = {"data": f"webdataset:{folder}/data/0.tar", "classes": folder / "names.txt", "views": 2}
    return ["ttt", *given(folder, values)]


@case("tar: a label that is code", 2, 3)
def _(folder: Path) -> list[str]:
    label = f"__import__('os').system('touch {MARK}')".encode()
    content = picture_bytes(folder)
    return on_tar(
        folder, [(member(f"{n}{end}"), value) for n in range(2) for end, value in ((".png", content), (".cls", label))]
    )


@case("split: images outside of the data", 2, 3)
def _(folder: Path) -> list[str]:
    data = write_coop(folder, "dtd")
    (split,) = data.glob("split_*.json")
    rows = json.loads(split.read_text())
    rows["test"][0][0], rows["test"][1][0] = "../../../victim", "/etc/passwd"
    split.write_text(json.dumps(rows))
    return ["ttt", *given(folder, {"data": f"coop:{data}", "views": 2})]


@case("split: nested without end")
def _(folder: Path) -> list[str]:
    data = write_coop(folder, "dtd")
    (split,) = data.glob("split_*.json")
    split.write_text('{"train":' + "[" * 200_000)
    return ["ttt", *given(folder, {"data": f"coop:{data}", "views": 2})]


@case("saved data set: a script and a description that names it")
def _(folder: Path) -> list[str]:
    data = folder / "data"
    data.mkdir()
    (data / "data.py").write_text(f"open({str(MARK)!r}, 'w')\n")
    (data / "dataset_info.json").write_text('{"builder_name": "data", "features": {"image": {"_type": "Own"}}}')
    (data / "state.json").write_text('{"_data_files": [{"filename": "../../victim"}], "_split": "train"}')
    return ["ttt", *given(folder, {"data": f"hf:{data}", "views": 2})]


@case("table: rows that name devices, commands and networks", 2, 3)
def _(folder: Path) -> list[str]:
    rows = ["/dev/zero,0", "http://127.0.0.1:9/a.png,1", f"|touch {MARK},0", "../../victim,1", f"$(touch {MARK}),1"]
    (folder / "t.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (folder / "names.txt").write_text("red\nblue\n")
    return ["ttt", *given(folder, {"data": f"csv:{folder}/t.csv", "classes": folder / "names.txt", "views": 2})]


NAMES = {
    "a YAML object": f"!!python/object/apply:os.system ['touch {MARK}']\nblue\n",
    "an expression": f"[__import__('os').system('touch {MARK}'), 'blue']",
    "a dictionary with a call": f"{{0: open({str(MARK)!r}, 'w'), 1: 'blue'}}",
    "brackets without end": "[" * 200_000,
    "escape sequences": "\x1b]0;owned\x07red\nblue\n",
}
for label, text in NAMES.items():

    @case(f"classes: {label}", 0, 2)
    def _(folder: Path, text: str = text) -> list[str]:
        (folder / "names.txt").write_text(text)
        return on_pictures(folder, classes=folder / "names.txt")


@case("templates: formats that reach into objects", 0, 2)
def _(folder: Path) -> list[str]:
    (folder / "t.txt").write_text("{0.__class__.__init__.__globals__}\na {!r} {}\n{name.__class__} {}\n")
    return on_pictures(folder, templates=folder / "t.txt")


@case("descriptions: nested without end")
def _(folder: Path) -> list[str]:
    (folder / "d.json").write_text('{"red":' + "[" * 200_000)
    return on_pictures(folder, templates=folder / "d.json")


@case("options: a table of code")
def _(folder: Path) -> list[str]:
    (folder / "o.toml").write_text(f"[__class__]\n__init__ = \"__import__('os').system('touch {MARK}')\"\n")
    return [*ttt(folder), "--options", str(folder / "o.toml")]


@case("options: JSON nested without end")
def _(folder: Path) -> list[str]:
    (folder / "o.json").write_text('{"views":' * 100_000)
    return [*ttt(folder), "--options", str(folder / "o.json")]


@case("pictures: scripts with the names of pictures", 2, 3)
def _(folder: Path) -> list[str]:
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch {MARK}) (w) file\nshowpage\n%%EOF\n"
    for name in ("red", "blue"):
        (folder / "data" / name).mkdir(parents=True)
        for ending in ("eps", "jpg", "png"):
            (folder / "data" / name / f"a.{ending}").write_text(script)
        (folder / "data" / name / "b.jpg").write_text(f'<svg><image href="http://127.0.0.1:9/{MARK}"/></svg>')
    return ["ttt", *given(folder, {"data": f"imagefolder:{folder}/data", "views": 2})]


@case("doctor: an archive with paths outside and links", 0, 1, 2)
def _(folder: Path) -> list[str]:
    members = [
        (member("../../victim.png"), picture_bytes(folder)), (member("../../victim.cls"), b"0"),
        (member("l.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (member("l.cls"), b"0"),
    ]  # fmt: skip
    on_tar(folder, members)
    return ["doctor", "--data", f"webdataset:{folder}/data/0.tar", "--all-files"]
