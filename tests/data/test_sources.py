"""Folders and feature files: what they hold, and one clear line for everything that they cannot be."""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rada_fast.data.sources import (
    FeatureFile,
    ImageFolder,
    UnreadableImageError,
    base_and_new,
    open_source,
    read_image,
    read_names,
)
from rada_fast.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for name, count in (("b_dog", 3), ("a_cat", 2), ("c_owl", 4)):
        (root / name / "deep").mkdir(parents=True)
        for index in range(count):
            place = root / name / ("deep" if index else ".") / f"{index}.{'PNG' if index else 'jpg'}"
            Image.new("RGB", (8, 6), (index, 2, 3)).save(place)
        (root / name / "notes.txt").write_text("not a picture")
        (root / name / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    return root


def test_an_image_folder_is_sorted_and_labelled_by_folder(folder: Path) -> None:
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ("a_cat", "b_dog", "c_owl")
    assert [sample.id for sample in source.samples][:3] == ["a_cat/0.jpg", "a_cat/deep/1.PNG", "b_dog/0.jpg"]
    assert [sample.label for sample in source.samples] == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_subsets_relabel_and_few_shots_do_not_depend_on_order(folder: Path) -> None:
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    subset = source.subset([2, 0])
    assert subset.folders == ("c_owl", "a_cat")
    assert {(sample.id.split("/")[0], sample.label) for sample in subset.samples} == {("c_owl", 0), ("a_cat", 1)}
    few = source.few_shot(2, seed=0)
    assert [sum(sample.label == label for sample in few.samples) for label in range(3)] == [2, 2, 2]
    turned = ImageFolder(source.root, source.folders, tuple(reversed(source.samples))).few_shot(2, seed=0)
    assert {sample.id for sample in turned.samples} == {sample.id for sample in few.samples}
    chosen = {tuple(sample.id for sample in source.few_shot(2, seed).samples) for seed in range(8)}
    assert len(chosen) > 1


def test_pictures_without_classes(folder: Path) -> None:
    source = open_source(f"images:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ()
    assert {sample.label for sample in source.samples} == {-1}
    assert len(source.samples) == 9


def test_folders_that_cannot_be_used(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "a.png")
    cases = {
        str(folder): "did you mean imagefolder:",
        "photos:somewhere": "data must be KIND:PATH with KIND one of imagefolder:DIR",
        f"imagefolder:{tmp_path / 'none'}": "does not exist",
        f"imagefolder:{tmp_path / 'empty'}": "must have one sub-folder a class, it has none",
        f"imagefolder:{tmp_path / 'flat'}": "for pictures without classes give images:",
        f"imagefolder:{tmp_path / 'classes'}": "has 1 sub-folders but no image",
        f"imagefolder:{folder / 'a_cat' / 'notes.txt'}": "is a file, not a folder",
        f"images:{tmp_path / 'empty'}": "holds no image",
    }
    for spec, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_source(spec)


def write(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"features:{path}"


def test_a_feature_file(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    spec = write(
        tmp_path / "f.npz", features=features, labels=np.array([0, 1, 2, 0, 1, 2]), class_names=["a", "b", "c"]
    )
    source = open_source(spec)
    assert isinstance(source, FeatureFile)
    assert source.class_names == ("a", "b", "c")
    assert torch.equal(source.features, torch.from_numpy(features))
    torch.testing.assert_close(source.normalised().norm(dim=-1), torch.ones(6))
    subset = source.subset([2, 0])
    assert subset.labels.tolist() == [1, 0, 1, 0]
    assert subset.ids == ("0", "2", "3", "5")
    assert subset.class_names == ("c", "a")
    assert len(source.few_shot(1, seed=0).labels) == 3


GOOD = np.ones((3, 4), np.float32)
LABELS = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": GOOD}, r"must have the arrays features and labels, it has \['features'\]"),
        ({"features": GOOD[0], "labels": LABELS}, r"features must be floating point \(N, D\) or \(N, V, D\)"),
        ({"features": GOOD.astype(int), "labels": LABELS}, "got int64"),
        ({"features": GOOD, "labels": LABELS[:2]}, r"labels must be 3 whole numbers, got shape \(2,\)"),
        ({"features": GOOD, "labels": LABELS[:, None]}, r"labels must be 3 whole numbers, got int64 \(3, 1\)"),
        ({"features": GOOD, "labels": LABELS, "logit_scale": np.array(1e39)}, r"that float32 holds, got 1e\+39"),
        ({"features": GOOD, "labels": LABELS.astype(float)}, "labels must be 3 whole numbers, got float64"),
        ({"features": GOOD, "labels": LABELS - 1}, "labels must be at least 0, got -1 in row 0"),
        ({"features": GOOD[:0], "labels": LABELS[:0]}, r"features must not be empty, got shape \(0, 4\)"),
        ({"features": GOOD * [[1], [np.nan], [np.inf]], "labels": LABELS}, "in 2 of 3 rows, the first is row 1"),
        ({"features": GOOD * [[1], [1], [0]], "labels": LABELS}, "must not be all zero, row 2 is"),
        ({"features": np.array([{}], dtype=object), "labels": LABELS}, "not a readable npz"),
    ],
)
def test_feature_files_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "f.npz", **arrays))


def test_feature_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"features:{tmp_path / 'f.npz'}")
    for content in (b"", b"no zip", b"PK\x03\x04torn"):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(UserError, match="is not a readable npz file"):
            open_source(f"features:{tmp_path / 'f.npz'}")


@pytest.mark.parametrize(
    ("shape", "held", "message"),
    [
        (
            "(100000000, 512)",
            12,
            r"features\.npy must have 204800000128 bytes for float32 \(100000000, 512\), it has 176",
        ),
        ("(2, 4)", 12, r"must have 160 bytes for float32 \(2, 4\), it has 176"),
        ("(3, 9999999999999999999999)", 12, r"must have \d+ bytes"),
        ("(1000000, 4)", 4_000_000, r"labels must be 1000000 whole numbers, got shape \(3,\)"),
    ],
)
def test_a_header_that_claims_other_arrays_than_there_are_costs_nothing(
    tmp_path: Path, shape: str, held: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4 * held)
        archive.writestr("features.npy", content)
        buffer = io.BytesIO()
        np.save(buffer, LABELS)
        archive.writestr("labels.npy", buffer.getvalue())
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **more: pytest.fail("memory was taken"))
    with pytest.raises(UserError, match=message):
        open_source(f"features:{tmp_path / 'f.npz'}")


def test_an_array_that_an_archive_holds_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "f.npz", features=GOOD, labels=LABELS)
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("labels.npy", archive.read("labels.npy"))
    with pytest.raises(UserError, match=r"it holds labels\.npy 2 times"):
        open_source(f"features:{tmp_path / 'f.npz'}")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder\.npz is a folder"):
        open_source(f"features:{tmp_path / 'folder.npz'}")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".tiff" if mode in ("F", "I;16") else ".png"
    path = tmp_path / f"picture{suffix}"
    Image.new(mode, (5, 3)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(path)
    assert image.mode == "RGB"
    assert image.size == (5, 3)


def test_pictures_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.jpg"
    Image.effect_noise((64, 64), 50).save(good)
    cases = {"torn.jpg": good.read_bytes()[:-300], "empty.png": b"", "text.png": b"hello"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImageError, match=f"{name} cannot be read: "):
            read_image(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=r"missing.png cannot be read"):
        read_image(tmp_path / "missing.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(UnreadableImageError, match=r"good.jpg cannot be read: Image size \(4096 pixels\) exceeds"):
        read_image(good)


def test_names_from_files(tmp_path: Path) -> None:
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


def test_base_is_the_first_half_rounded_up() -> None:
    assert base_and_new(5) == ([0, 1, 2], [3, 4])
    assert base_and_new(1) == ([0], [])


def test_empty_class_folders_stay_classes(folder: Path) -> None:
    (folder / "b_bat").mkdir()
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    assert source.folders == ("a_cat", "b_bat", "b_dog", "c_owl")
    assert source.empty_folders == ("b_bat",)
    assert source.subset([1, 3]).empty_folders == ("b_bat",)
    assert source.subset([3, 0]).empty_folders == ()


def test_links_are_followed_but_never_round_in_circles(folder: Path) -> None:
    (folder / "b_dog" / "more").symlink_to(folder / "a_cat")
    (folder / "b_dog" / "self").symlink_to(folder / "b_dog")
    (folder / "b_dog" / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "d_cat").symlink_to(folder / "a_cat")
    source = open_source(f"imagefolder:{folder}")
    assert isinstance(source, ImageFolder)
    by_folder = {name: [s.id for s in source.samples if s.label == i] for i, name in enumerate(source.folders)}
    assert by_folder["d_cat"] == ["d_cat/0.jpg", "d_cat/deep/1.PNG"]
    assert by_folder["b_dog"] == [
        "b_dog/0.jpg",
        "b_dog/deep/1.PNG",
        "b_dog/deep/2.PNG",
        "b_dog/more/0.jpg",
        "b_dog/more/deep/1.PNG",
    ]


@pytest.mark.parametrize("spec", ["imagefolder:", "features:", ""])
def test_a_kind_without_a_path_is_not_the_current_folder(spec: str) -> None:
    with pytest.raises(UserError, match="data must be KIND:PATH"):
        open_source(spec)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        # Finite in float64, infinite or without a direction in the float32 that everything computes in.
        ({"features": GOOD.astype(np.float64) * 1e300, "labels": LABELS}, "in 3 of 3 rows, the first is row 0"),
        ({"features": GOOD * np.float64(1e-30), "labels": LABELS}, "must not be all zero, row 0 is"),
        ({"features": np.stack([GOOD, GOOD * [[1], [0], [1]]], 1), "labels": LABELS}, "must not be all zero, row 1 is"),
        ({"features": GOOD, "labels": LABELS, "class_names": ["a", "b"]}, "class_names must be at least 3 texts"),
        ({"features": GOOD, "labels": LABELS, "class_names": [["a", "b", "c"]]}, "class_names must be at least 3"),
        ({"features": GOOD, "labels": LABELS, "class_names": LABELS}, "class_names must be at least 3 texts"),
    ],
)
def test_values_that_cannot_be_computed_with(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "f.npz", **arrays))


def test_other_arrays_and_byte_texts_of_a_feature_file(tmp_path: Path) -> None:
    names = np.array(["a", "b", "\u00e7"])
    other = np.array([{}], dtype=object)
    views = np.random.default_rng(0).normal(size=(3, 2, 4))
    spec = write(
        tmp_path / "f.npz", features=views, labels=LABELS, class_names=np.char.encode(names, "utf-8"), other=other
    )
    source = open_source(spec)
    assert isinstance(source, FeatureFile)
    assert source.class_names == ("a", "b", "\u00e7")
    torch.testing.assert_close(source.normalised().norm(dim=-1), torch.ones(3, 2))


def test_damage_anywhere_in_a_feature_file_is_a_user_error_at_most(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=np.random.default_rng(0).normal(size=(3, 4)), labels=LABELS)
    path = tmp_path / "f.npz"
    for index in range(0, len(buffer.getvalue()), 3):
        raw = bytearray(buffer.getvalue())
        raw[index] ^= 0xFF
        for content in (raw, raw[:index]):
            path.write_bytes(content)
            # Some bytes of an archive carry nothing: then the file is read.
            with contextlib.suppress(UserError):
                open_source(f"features:{path}")


def test_the_reason_of_an_unreadable_picture_does_not_name_python_objects(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / "text.png")
    assert str(caught.value) == "text.png cannot be read: not an image of a known kind"


def test_whatever_a_decoder_raises_is_an_unreadable_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (KeyError("chunk"), IndexError("list\nindex"), RuntimeError()):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(UnreadableImageError, match=r"a\.png cannot be read: ") as caught:
            read_image(tmp_path / "a.png")
        assert "\n" not in str(caught.value)
