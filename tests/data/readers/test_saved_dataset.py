"""Data sets that the library datasets has saved are read row by row; without the library, a message says what to do."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path

import pytest
from PIL import Image

from rada_fast.data.decode import read_image
from rada_fast.data.open import open_source
from rada_fast.data.sources import ImageFolder
from rada_fast.errors import UserError


def opened(spec: str) -> ImageFolder:
    source = open_source(spec)
    assert isinstance(source, ImageFolder)
    return source


def encoded(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").touch()
    with pytest.raises(UserError, match=r"hf:PATH needs the package datasets .*: pip install 'rada_fast\[data\]'"):
        open_source(f"hf:{tmp_path}")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a folder that save_to_disk .* wrote, .*; it is empty"):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"hf:{tmp_path}/none")


# The library warns of its own dependencies when it makes data sets.
SAVING = pytest.mark.filterwarnings("ignore:Cannot (locate|pickle)")


@SAVING
def test_rows_have_pictures_and_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "owl"])})
    parts = {
        name: datasets.Dataset.from_dict(
            {"img": [{"bytes": encoded(index), "path": None} for index in range(count)], "label": [1, 0, 1, 1][:count]},
            features=features,
        )
        for name, count in (("train", 4), ("validation", 2))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    train, test = open_source(f"hf:{tmp_path}/both", "train"), opened(f"hf:{tmp_path}/both")
    assert (len(train.ids), len(test.ids)) == (4, 2)
    assert test.folders == ("cat", "owl")
    assert test.labels.tolist() == [1, 0]
    assert opened(f"hf:{tmp_path}/both/train").ids == train.ids
    assert opened(f"hf:{tmp_path}/both@train").labels.tolist() == [1, 0, 1, 1]
    sample = pickle.loads(pickle.dumps(train.samples[3]))
    assert read_image(sample.path).getpixel((0, 0)) == (3, 0, 0)
    assert len(set(train.stamps().values())) == 4
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="has no part for test, it has train; give one"):
        open_source(f"hf:{tmp_path}/one")


@SAVING
def test_columns_of_other_types(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    rows = {"image": [encoded(index) for index in range(3)], "class_name": ["owl", "cat", "owl"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "bytes")
    source = opened(f"hf:{tmp_path}/bytes")
    assert (source.folders, source.labels.tolist()) == (("cat", "owl"), [1, 0, 1])
    assert read_image(source.samples[2].path).getpixel((0, 0)) == (2, 0, 0)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(UserError, match="must have one column of type Image, it has 0 among text"):
        open_source(f"hf:{tmp_path}/texts")
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded(1))
    paths = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(outside)}]})
    paths = paths.cast_column("image", datasets.Image())
    paths.save_to_disk(tmp_path / "paths")
    source = opened(f"hf:{tmp_path}/paths")
    assert source.labels.tolist() == [-1]
    (tmp_path / "bytes" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is not a readable data set"):
        open_source(f"hf:{tmp_path}/bytes")
