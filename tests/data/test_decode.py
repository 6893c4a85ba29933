"""Pictures of every kind are decoded and scaled, or are unreadable with a reason, and pipes are never opened."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rada_fast.data.decode import UnreadableImageError, is_picture, read_image
from rada_fast.data.open import open_source
from rada_fast.system import memory
from tests.pictures import write_class_folders

RAMP = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
EIGHT = np.round(RAMP / 65535 * 255).astype(np.uint8)


def grey_of(path: Path) -> np.ndarray:
    pixels = np.asarray(read_image(path))
    assert pixels.dtype == np.uint8
    assert (pixels[..., :1] == pixels).all()
    return pixels[..., 0]


# PNG and TIFF have 16 bits, TIFF in both byte orders and also 32 bits; Pillow reads PGM's 16 bits as 32-bit numbers.
@pytest.mark.parametrize("kind", ["a.png", "a.tif", "big.tif", "a.pgm", "wide.tif"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "big.tif":
        Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(RAMP.astype(np.int32) if kind == "wide.tif" else RAMP).save(path)
    assert np.array_equal(grey_of(path), EIGHT)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path: Path, kind: type) -> None:
    values = {np.uint8: EIGHT, np.uint16: RAMP, np.float32: RAMP / 65535}[kind].astype(kind)
    picture = Image.fromarray(values)
    white_is_zero = {262: 0}
    # Pillow inverts only pixels of 8 bits when it writes them.
    picture.save(tmp_path / "a.tif", tiffinfo=white_is_zero)
    with Image.open(tmp_path / "a.tif") as saved:
        assert saved.tag_v2[262] == 0
    assert np.array_equal(grey_of(tmp_path / "a.tif"), EIGHT if kind is np.uint8 else 255 - EIGHT)


def write_tiff(path: Path, pixels: bytes, *, width: int, bits: int, sample_format: int) -> None:
    """Write a grey TIFF of one row, of a kind that Pillow reads but does not write."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    entries[339] = sample_format
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    content = struct.pack("<2sHI", b"II", 42, 8 + 8) + pixels.ljust(8, b"\0")
    path.write_bytes(content + struct.pack("<H", len(entries)) + directory + bytes(4))


def test_signed_16_bits_are_scaled_by_their_largest_value(tmp_path: Path) -> None:
    pixels = np.array([0, 16384, 32767], "<i2").tobytes()
    write_tiff(tmp_path / "a.tif", pixels, width=3, bits=16, sample_format=2)
    assert grey_of(tmp_path / "a.tif").tolist() == [[0, 128, 255]]


def test_12_bits_are_scaled_by_their_largest_value(tmp_path: Path) -> None:
    # Two pixels share three bytes: 0 and 2048, then 4095 and 0.
    write_tiff(tmp_path / "a.tif", bytes.fromhex("000800fff000"), width=4, bits=12, sample_format=1)
    assert grey_of(tmp_path / "a.tif").tolist() == [[0, 128, 255, 0]]


def test_the_largest_value_that_a_pgm_states_is_white(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1000\n" + np.array([0, 500, 1000], ">u2").tobytes())
    assert grey_of(tmp_path / "a.pgm").tolist() == [[0, 128, 255]]


def test_16_bits_of_colour_are_scaled_to_8(tmp_path: Path) -> None:
    pixels = np.array([[65535, 32896, 257]], ">u2")
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535\n" + pixels.tobytes())

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, 2, 0, 0, 0]))  # 1 x 1 pixels of RGB with 16 bits
    body = chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    for name in ("a.ppm", "a.png"):
        assert np.asarray(read_image(tmp_path / name)).tolist() == [[[255, 128, 1]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.2, 255.0], [0, 100, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([-1.0, 0.0, 1.0], r"floating-point pixels must lie in 0 ... 1 or 0 ... 255 to be brightnesses, got -1 ... 1"),
        ([0.0, 0.0, 4095.0], "got 0 ... 4095"),
        ([0.0, np.nan, 1.0], "got nan"),
    ],
)
def test_floats_are_scaled_by_a_rule_or_refused(tmp_path: Path, values: list[float], expected: list[int] | str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([values], np.float32)).save(path)
    if isinstance(expected, str):
        with pytest.raises(UnreadableImageError, match=rf"a.tif cannot be read: .*{expected}"):
            read_image(path)
    else:
        assert grey_of(path).tolist() == [expected]


def test_wide_whole_numbers_are_8_or_16_bits_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 128, 255]], np.int32)).save(path)
    assert grey_of(path).tolist() == [[0, 128, 255]]
    for values in ([-1, 5], [0, 65536]):
        Image.fromarray(np.array([values], np.int32)).save(path)
        with pytest.raises(UnreadableImageError, match=r"must lie in 0 ... 65535 to be brightnesses"):
            read_image(path)


def test_other_file_names_are_read_by_name_or_content(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), (200, 100, 50))
    saved = {"a.jfif": "JPEG", "a.jpe": "JPEG", "a.AVIF": "AVIF", "a.pgm": "PPM", "a.tga": "TGA", "a.jp2": "JPEG2000"}
    by_content = {"none": "PNG", "a.jpg_original": "JPEG", "a.dat": "BMP", "b": "GIF", "c": "TIFF", "d.x": "WEBP"}
    by_content |= {"e": "PPM", "f": "AVIF", "g": "JPEG2000"}
    for name, kind in (saved | by_content).items():
        (picture.convert("L") if name.endswith(".pgm") else picture).save(tmp_path / name, kind)
        assert is_picture(tmp_path / name), name
        assert read_image(tmp_path / name).size == (4, 4)


@pytest.mark.parametrize(
    "content",
    [b"", b"a note", b"BMW and others", b"P3 is a model", b"P1,2,3\n", b"name,label\na.jpg,1\n", b"\xd0\xcf\x11\xe0"],
)
def test_texts_and_other_files_are_not_taken_for_pictures(tmp_path: Path, content: bytes) -> None:
    for name in ("Thumbs.db", "README", "labels.csv"):
        (tmp_path / name).write_bytes(content)
        assert not is_picture(tmp_path / name)
    assert not is_picture(tmp_path / "missing")


def test_a_damaged_picture_without_a_suffix_counts_as_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "whole", "PNG")
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:20])
    assert is_picture(tmp_path / "torn")
    with pytest.raises(UnreadableImageError, match="torn cannot be read"):
        read_image(tmp_path / "torn")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "round.jpg").symlink_to(tmp_path / "round.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "empty.jpg").touch()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.jpg"))
        for name, reason in {
            "pipe": "it is a FIFO, not a file",
            "folder": "it is a folder, not a file",
            "zero": "it is a device, not a file",
            "socket": "it is a socket, not a file",
            "round": "Too many levels of symbolic links",
            "gone": "No such file or directory",
            "empty": "the file is empty",
        }.items():
            with pytest.raises(UnreadableImageError) as caught:
                read_image(tmp_path / f"{name}.jpg")
            assert str(caught.value) == f"{name}.jpg cannot be read: {reason}"


def test_a_picture_never_starts_another_program(tmp_path: Path) -> None:
    # Pillow would give an EPS file to Ghostscript, whatever its name.
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    assert not is_picture(tmp_path / "a.eps")
    with pytest.raises(UnreadableImageError, match=r"a.jpg cannot be read: not an image of a known kind"):
        read_image(tmp_path / "a.jpg")


def test_a_lack_of_file_handles_is_not_blamed_on_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def raise_too_many_open_files(*args: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", raise_too_many_open_files)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("room", [False, True])
def test_a_lack_of_memory_is_not_blamed_on_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """A file that asks for more than the system could ever give is damaged."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def raise_no_memory(*args: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", raise_no_memory)
    monkeypatch.setattr(memory, "has_room", lambda size: room)
    expected = (UnreadableImageError, "more memory than a picture needs") if room else (MemoryError, None)
    with pytest.raises(expected[0], match=expected[1]):
        read_image(tmp_path / "a.png")


def test_animations_orientations_and_transparency_are_read_as_by_torchvision(tmp_path: Path) -> None:
    red, blue = (Image.new("P", (4, 2), 1) for _ in range(2))
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue.putpalette([0, 0, 0, 0, 0, 255])
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue], transparency=0)
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 2)
    Image.new("P", (4, 2), 1).save(tmp_path / "p.png", transparency=bytes([0, 128]))
    assert read_image(tmp_path / "p.png").mode == "RGB"


def test_a_picture_that_is_deleted_during_the_run_is_unreadable(tmp_path: Path) -> None:
    from rada_fast.data.views import Preprocess, ViewDataset

    write_class_folders(tmp_path, ("a", "b"))
    source = open_source(f"imagefolder:{tmp_path}")
    views = ViewDataset(source.samples, Preprocess(4, (0.5,) * 3, (0.5,) * 3), 1, "crop", 0)
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "another.png")
    assert views[0] == (0, None, "0.png cannot be read: No such file or directory")
    assert views[1][1] is not None


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


def test_unreadable_pictures_have_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_reason_of_an_unreadable_picture_does_not_name_python_objects(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / "text.png")
    assert str(caught.value) == "text.png cannot be read: not an image of a known kind"


def test_any_error_of_a_decoder_makes_a_picture_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for error in (KeyError("chunk"), IndexError("list\nindex"), RuntimeError()):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(UnreadableImageError, match=r"a\.png cannot be read: ") as caught:
            read_image(tmp_path / "a.png")
        assert "\n" not in str(caught.value)
