"""Feature files are read as data, and every file that cannot be used is refused in one clear line."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rada_fast.data.open import open_source
from rada_fast.data.sources import FeatureFile
from rada_fast.errors import UserError

GOOD = np.ones((3, 4), np.float32)
LABELS = np.array([0, 1, 2])


def write(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"features:{path}"


def test_a_feature_file_is_read(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    spec = write(
        tmp_path / "f.npz", features=features, labels=np.array([0, 1, 2, 0, 1, 2]), class_names=["a", "b", "c"]
    )
    source = open_source(spec)
    assert isinstance(source, FeatureFile)
    assert source.class_names == ("a", "b", "c")
    assert torch.equal(source.features, torch.from_numpy(features))
    torch.testing.assert_close(source.views().norm(dim=-1), torch.ones(6, 1))
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.ids == ("0", "1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, r"must have the array features, it has \['labels'\]"),
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
def test_unusable_feature_files_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "f.npz", **arrays))


def test_files_that_hold_no_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"features:{tmp_path / 'f.npz'}")
    for content in (b"", b"no zip", b"PK\x03\x04torn"):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(UserError, match="is not a readable npz file"):
            open_source(f"features:{tmp_path / 'f.npz'}")


@pytest.mark.parametrize(
    ("shape", "values_stored", "message"),
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
def test_a_header_that_lies_about_its_array_is_refused_without_allocating(
    tmp_path: Path, shape: str, values_stored: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4 * values_stored)
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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        # These are finite in float64, but infinite or without a direction in float32, in which everything is computed.
        ({"features": GOOD.astype(np.float64) * 1e300, "labels": LABELS}, "in 3 of 3 rows, the first is row 0"),
        ({"features": GOOD * np.float64(1e-30), "labels": LABELS}, "must not be all zero, row 0 is"),
        ({"features": np.stack([GOOD, GOOD * [[1], [0], [1]]], 1), "labels": LABELS}, "must not be all zero, row 1 is"),
        ({"features": GOOD, "labels": LABELS, "class_names": ["a", "b"]}, "class_names must be at least 3 texts"),
        ({"features": GOOD, "labels": LABELS, "class_names": [["a", "b", "c"]]}, "class_names must be at least 3"),
        ({"features": GOOD, "labels": LABELS, "class_names": LABELS}, "class_names must be at least 3 texts"),
    ],
)
def test_values_that_float32_cannot_hold_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "f.npz", **arrays))


def test_other_arrays_and_byte_strings_of_a_feature_file_are_read(tmp_path: Path) -> None:
    names = np.array(["a", "b", "\u00e7"])
    other = np.array([{}], dtype=object)
    views = np.random.default_rng(0).normal(size=(3, 2, 4))
    spec = write(
        tmp_path / "f.npz", features=views, labels=LABELS, class_names=np.char.encode(names, "utf-8"), other=other
    )
    source = open_source(spec)
    assert isinstance(source, FeatureFile)
    assert source.class_names == ("a", "b", "\u00e7")
    torch.testing.assert_close(source.views().norm(dim=-1), torch.ones(3, 2))


def test_damage_anywhere_in_a_feature_file_causes_at_most_a_user_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=np.random.default_rng(0).normal(size=(3, 4)), labels=LABELS)
    path = tmp_path / "f.npz"
    for index in range(0, len(buffer.getvalue()), 3):
        raw = bytearray(buffer.getvalue())
        raw[index] ^= 0xFF
        for content in (raw, raw[:index]):
            path.write_bytes(content)
            # Where the damaged byte carries no data, the file can be read.
            with contextlib.suppress(UserError):
                open_source(f"features:{path}")
