"""Images are read with little shared memory and without worker processes, and a killed worker is reported."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rada_fast import cli
from rada_fast.data import views
from rada_fast.data.decode import read_image
from rada_fast.data.open import open_source
from rada_fast.models import encoded_parts, image_features
from rada_fast.models.vision_language import load_model
from rada_fast.system import ranks
from tests.pictures import write_class_folders
from tests.processes import run_ranks


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "pictures", ("red plain square", "blue plain ring", "green plain ring"))


def views_of(pictures: Path, workers: int) -> list[Tensor]:
    source = open_source(f"imagefolder:{pictures}")
    stream = image_features.iterate_views(
        source.samples, load_model("embedded"), views=3, kind="crop", seed=0, workers=workers
    )
    views_by_image = [image_views for _, image_views, _ in stream]
    assert all(image_views is not None for image_views in views_by_image)
    return [image_views for image_views in views_by_image if image_views is not None]


def full_shared_memory(tensor: Tensor) -> Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_views_are_sent_through_a_pipe_where_shared_memory_is_full(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = views_of(pictures, workers=0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full_shared_memory)
    _, sent, _ = image_features.prepare_for_sending((0, torch.ones(2), None))
    assert not isinstance(sent, Tensor)
    for expected, found in zip(alone, views_of(pictures, workers=1), strict=True):
        assert torch.equal(expected, found)


def test_images_are_read_in_this_process_where_no_other_can_be_started(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = views_of(pictures, workers=0)

    class Refused(image_features.DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            if self.num_workers:
                raise OSError(38, "Function not implemented")
            return super().__iter__()

    monkeypatch.setattr(image_features, "DataLoader", Refused)
    found = views_of(pictures, workers=2)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert "warning: --workers 2 cannot be started" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConnectionResetError("by peer"), EOFError(), FileNotFoundError("no socket")])
def test_a_worker_that_ends_while_sending_is_not_taken_for_a_full_disk(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Broken(image_features.DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise error
            yield

    monkeypatch.setattr(image_features, "DataLoader", Broken)
    monkeypatch.setattr(image_features, "SECONDS_TO_SIGNAL", 0.0)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        views_of(pictures, workers=1)


def test_a_worker_that_the_system_kills_is_reported_and_the_run_goes_on_later(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = os.getpid()

    def killed(path: Path) -> Image.Image:
        if os.getpid() != main and path.parent.name.startswith("red"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path)

    data = f"imagefolder:{pictures}"
    command = ["eft", "--train", data, "--test", data, "--protocol", "all", "--epochs", "1"]
    command += ["--output", str(tmp_path / "out"), "--workers", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(views, "read_image", killed)
        assert cli.main(command) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("rada-fast: the system ended a process that reads images")
    assert "; to go on: rada-fast eft --train " in line
    assert cli.main(command) == 0
    assert len((tmp_path / "out" / "images.jsonl").read_text().splitlines()) == 3


def test_an_encoding_that_was_cut_off_goes_on_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is encoded once, together with the same others, and one that cannot be read is tried again."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "specks" / "cat"
    folder.mkdir(parents=True)
    for index in range(100):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index:03}.png")
    spoilt = folder / "040.png"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:60])
    samples, vlm = open_source(f"imagefolder:{folder.parent}").samples, load_model("embedded")
    encode_images, encoded, cut = vlm.encode_images, list[str](), 2
    monkeypatch.setattr(encoded_parts, "PART_SECONDS", 0.0)

    def encode_some(images: Tensor, ids: Sequence[str]) -> Tensor:
        if len(encoded) == cut:
            raise KeyboardInterrupt
        encoded.append(ids[0])
        return encode_images(images, ids)

    monkeypatch.setattr(vlm, "encode_images", encode_some)
    for trained in ("", "weights"):
        encoded.clear()
        cut = 2
        with pytest.raises(KeyboardInterrupt):
            image_features.encode_images(samples, vlm, title="cut off", workers=0, trained=trained)
        cut = -1
        resumed = image_features.encode_images(samples, vlm, title="go on", workers=0, trained=trained)
        assert encoded == [f"cat/{index:03}.png" for index in (0, 32, 64, 96)]
        again = image_features.encode_images(samples, vlm, title="once more", workers=0, trained=trained)
        assert len(encoded) == 4
        assert [one.id for one in resumed.unreadable] == ["cat/040.png"]
        assert resumed.unreadable == again.unreadable
        assert torch.equal(resumed.features, again.features)
    monkeypatch.setattr(vlm, "encode_images", encode_images)
    afresh = image_features.encode_images(samples, vlm, title="afresh", workers=0, trained="other weights")
    assert torch.equal(resumed.features, afresh.features)
    assert resumed.ids == afresh.ids
    stamp = spoilt.stat()
    spoilt.write_bytes(content[: stamp.st_size])
    monkeypatch.setattr(encoded_parts, "_is_readable", lambda sample: True)
    monkeypatch.setattr(vlm, "encode_images", encode_some)
    encoded.clear()
    os.utime(spoilt, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    image_features.encode_images(samples, vlm, title="mended", workers=0)
    assert encoded == [f"cat/{index:03}.png" for index in (32, 64, 96)]  # all from the part that lacked a picture


def save_features(pictures: Path, folder: Path) -> None:
    """Encode the pictures and crops of them together with the other ranks, and save what this rank then has."""
    with ranks.joined() as group:
        samples, model = open_source(f"imagefolder:{pictures}").samples, load_model("embedded")
        whole = image_features.encode_images(samples, model, title="encode", workers=0)
        crops = image_features.encode_crops(samples, model, title="encode", seed=1, draw="2", workers=0)
        few = image_features.encode_images(samples[:3], model, title="encode", workers=0)
        again = image_features.encode_images(samples, model, title="encode", workers=0)
        found = [[one.features, one.labels, one.ids, one.unreadable] for one in (whole, crops, few, again)]
        torch.save(found, folder / f"{group.count}-{group.rank}.pt")


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_have_the_features_of_a_single_process_to_the_bit(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seventy pictures are three batches, of which the last is not full. One rank has a batch that is a picture short.
    pictures = write_class_folders(tmp_path / "pictures", [f"class {label}" for label in range(7)], each=10)
    (pictures / "class 3" / "4.png").write_bytes(b"no picture")
    save_features(pictures, tmp_path)
    monkeypatch.setenv("RADA_FAST_CACHE", str(tmp_path / "cache"))
    started = run_ranks(count, tmp_path / "log", save_features, pictures, tmp_path)
    alone = torch.load(tmp_path / "1-0.pt", weights_only=False)
    for rank in range(count):
        for expected, found in zip(alone, torch.load(tmp_path / f"{count}-{rank}.pt", weights_only=False), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(expected[:2], found[:2], strict=True))
            assert expected[2:] == found[2:]
    assert all(not rank.errors.read_text() for rank in started[1:])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("empty", [False, True])
def test_pictures_whose_disk_has_gone_are_not_unreadable(tmp_path: Path, workers: int, empty: bool) -> None:
    """Where a disk was mounted, there is an empty folder or none. Its pictures are read when it is there again."""
    write_class_folders(tmp_path / "disk", ("a", "b"))
    source = open_source(f"imagefolder:{tmp_path / 'disk'}")
    stream = image_features.iterate_views(
        source.samples, load_model("embedded"), views=1, kind="crop", seed=0, workers=workers
    )
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    if empty:
        (tmp_path / "disk" / "a").mkdir(parents=True)
    where = re.escape(str(tmp_path / "disk" / "a"))
    with pytest.raises(OSError, match=f"^.Errno 116. the folder of pictures was removed, .*: '{where}'$"):
        list(stream)
